"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Let a file appear only when it is finished, so that one found later can be trusted.

    Args:
        path: The file; its folder exists.

    Yields:
        Where to write instead, beside it. A write that fails leaves nothing of that, and ``path`` as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Let a folder appear only when it is finished.

    Args:
        folder: The folder; it must not exist, or be empty.

    Yields:
        Where to write instead, beside it. A write that fails leaves nothing of that.

    Raises:
        MisconfigurationException: The folder is in use.
    """
    check_unused(folder)
    with replaced_folder(folder) as part:
        yield part


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Let a folder take the place of what may stand there, a file or a link too, when it is finished.

    Args:
        folder: The folder.

    Yields:
        Where to write instead, beside it. A write that fails leaves nothing of that, and ``folder`` as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = _beside(folder), _beside(folder)
    part.mkdir()
    try:
        yield part
        if folder.is_symlink() or folder.exists():
            folder.rename(old)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")


def check_unused(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        MisconfigurationException: It does.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # the command line starts without Lightning

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MisconfigurationException(f"{folder} is in use. Choose a folder that does not exist yet, or is empty.")

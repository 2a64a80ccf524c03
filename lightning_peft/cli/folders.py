"""Folders of runs: one command at a time in each, and each says what its results were made with."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from jsonargparse import Namespace

from lightning_peft.cli.classes import import_class
from lightning_peft.cli.recipes import UsageError

if TYPE_CHECKING:
    from lightning_peft.cli.launch import RecipeCLI

CONFIG, LOCK = "config.yaml", ".lock"
_PACKAGES = ("lightning-peft", "lightning", "torch")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Hold a folder, made when missing, so that no other command writes into it.

    The operating system lets go of it however the process ends.

    Raises:
        UsageError: Another command holds it, or it cannot be written.
    """
    lock = try_hold(folder)
    if lock is None:
        raise UsageError(f"Another command is working in {folder}. Wait for it, or choose another folder with --out.")
    try:
        yield folder
    finally:
        lock.release()


def try_hold(folder: Path) -> FileLock | None:
    """Return the lock of a folder, acquired; ``None`` when another command has it.

    Raises:
        UsageError: The folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be written: {error}. Choose another with --out.") from error
    return lock


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder in which nothing can be written, before anything was done for it; nothing is made here.

    Args:
        folder: The folder; it need not exist.
        option: The option that chooses it.

    Raises:
        UsageError: It may not be written, or a file stands where a folder must.
    """
    above = folder
    while not os.path.lexists(above):
        above = above.parent
    reason = f"{above} is no folder" if not above.is_dir() else "" if os.access(above, os.W_OK | os.X_OK) else "it is read-only"
    if reason:
        raise UsageError(f"The folder {folder} cannot be written: {reason}. Choose another with {option}.")


def settings(cli: RecipeCLI, made_from: Sequence[str] = ()) -> str:
    """Return all that results of a recipe depend on, as the text of a configuration file.

    Args:
        cli: The parsed recipe.
        made_from: Lines about what stands in no configuration, such as the digest of a source model.

    Returns:
        A LightningCLI file, under comments that name versions and the digests of the user's own code.
    """
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    comments = [f"made with {versions}", *_own_code(cli), *made_from]
    return "".join(f"# {line}\n" for line in comments) + str(cli.parser.dump(cli.config, skip_none=False))


def digest(text: str) -> str:
    """Return the digest of a text, such as that of :func:`settings`."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def check_settings(folder: Path, now: str, *, kept: bool) -> None:
    """Write the settings of a new run; refuse to continue one that had others.

    Args:
        folder: Folder of the run.
        now: Its :func:`settings`.
        kept: Whether the folder has results, or a checkpoint to continue from. Otherwise a run that failed early may have left
            its settings, and they count for nothing.

    Raises:
        UsageError: The folder holds a run with other settings.
    """
    path = folder / CONFIG
    if not kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(now)
        return
    then = path.read_text() if path.is_file() else ""
    if then == now:
        return
    changed = [line.strip() for line in now.splitlines() if line not in then.splitlines()]
    raise UsageError(
        f"{folder} holds a run with other settings; changed are: {'; '.join(changed[:4]) or 'lines left out'}. Repeat its "
        "overrides to continue it, or choose another folder with --out."
    )


def _own_code(cli: RecipeCLI) -> Iterator[str]:
    """Name each file that defines a class of the recipe and is part of no installed package, with its digest."""
    config = cli.config
    entries = [config.get("model"), config.get("data"), *cli.entries()]
    paths = dict.fromkeys(str(entry.class_path) for entry in entries if isinstance(entry, Namespace) and "class_path" in entry)
    seen: set[Path] = set()
    for path in paths:
        name = import_class(path).__module__
        if name.split(".")[0] in ("lightning", "lightning_peft", "lightning_peft_plugins", "torch"):
            continue  # their versions say it
        try:
            file = Path(inspect.getsourcefile(import_class(path)) or "")
        except TypeError:
            continue
        if file.is_file() and file not in seen and "site-packages" not in file.parts:
            seen.add(file)
            yield f"{file.name} {file_digest(file)[:16]}"

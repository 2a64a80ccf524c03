"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
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

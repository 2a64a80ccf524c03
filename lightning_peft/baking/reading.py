"""Reading checkpoint files: plain data without running anything, and Python objects only for a caller who trusts the file."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import pickle
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_peft.structure import shard_folder
from lightning_peft.structure.checkpoint import CheckpointError

_PATHS = (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
_HARMLESS: list[tuple[Any, str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    *((cls, f"{module}.{cls.__name__}") for cls in _PATHS for module in ("pathlib", "pathlib._local")),  # the latter in 3.13
]
"""Classes that are read without trust, by their names in files: made of strings and attributes, they open and call nothing.

NumPy's are not among them, because its C code rebuilds arrays and scalars without checking what stands in a hostile file; nor
are enums, functions and networks, because each is code of its author's, which the file only names.
"""
_LOCK = threading.RLock()


@contextlib.contextmanager
def harmless_objects() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read paths and ``argparse.Namespace`` while the context is open."""
    with _LOCK:  # torch keeps one list for the process: another thread's exit would shorten it in the middle of a read
        allowed = torch.serialization.get_safe_globals()  # by the user, who must find it unchanged afterwards
        with torch.serialization.safe_globals([pair for pair in _HARMLESS if pair not in allowed]):
            yield


@contextlib.contextmanager
def readable(path: str | Path, trusted: bool) -> Iterator[None]:
    """Say of what goes wrong while a file is read whether it is damaged, or not trusted.

    Raises:
        CheckpointError: Whatever went wrong, unless there is no such file, or nobody may read it.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, PermissionError, CheckpointError):
        raise
    except Exception as error:  # a damaged file can raise anything, and so can the code of a trusted one
        raise CheckpointError(_reason(path, error, trusted)) from error


def read_checkpoint(path: str | Path, *, trusted: bool = False) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is run unless it is trusted.

    Args:
        path: Checkpoint of any Lightning run, a file or a folder of shards.
        trusted: Whether Python objects in it may be rebuilt, which can run any code: hyperparameters that hold a network, an
            OmegaConf configuration, an enum, an array of NumPy. Only for files whose source you know.

    Raises:
        CheckpointError: The file is no checkpoint, is damaged, holds Python objects and is not trusted, or holds objects that
            cannot be rebuilt here.
        FileNotFoundError: There is no such file.
    """
    with readable(path, trusted), harmless_objects():
        if shard_folder.is_shard_folder(path):
            loaded = shard_folder.read(path, trusted=trusted)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=not trusted)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), Mapping):
        raise CheckpointError(f'{path} is not a Lightning checkpoint: it has no "state_dict".')
    return loaded


def _reason(path: str | Path, error: Exception, trusted: bool) -> str:
    first = (str(error) or "it ends too early").splitlines()[0]
    if isinstance(error, (AttributeError, ImportError)) and trusted:
        return (
            f"{path} holds an object that cannot be rebuilt here: {first}. Install or import the module that defines it. A "
            "class of a script is found in that script only: call lightning_peft there, or move the class into a module and "
            "save again."
        )
    if isinstance(error, pickle.UnpicklingError) and not trusted:
        return (
            f"{path} holds Python objects besides plain data and was not opened, because loading them could run code: "
            f"{objects_in(path) or first}. If you trust its source, pass trusted=True (on the command line: --trusted)."
        )
    return f"{path} is not a readable checkpoint: {first}"


def objects_in(path: str | Path) -> str:
    """Name the classes and functions a file would need, without loading them; empty when that cannot be told."""
    try:
        with harmless_objects():
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # an old or damaged file, for which the caller has another message
        return ""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

"""Compiling `kernels.c` once per machine, and loading a library only if nobody else can have written it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lightning_peft.assets.archives import cache_dir

SOURCE = Path(__file__).with_name("kernels.c")
_PROCESSOR = {"AVX512": ("-mavx512f", "-mavx2", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
_COMPILE_S = 120
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def compiler() -> list[str]:
    """The C compiler as the words of a command, arguments in ``CC`` included; empty where there is none.

    Raises:
        ValueError: ``CC`` ends within quotes.
    """
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    return shlex.split(os.environ.get("CC", "")) or ([found] if found else [])


def thread_flags() -> Iterator[Sequence[str]]:
    """With the OpenMP that PyTorch has loaded, so that both use the same threads; then without threads."""
    maps = Path("/proc/self/maps")
    loaded = re.findall(r"\S*/libgomp[^/\s]*", maps.read_text()) if maps.exists() else []
    if loaded:
        yield "-fopenmp", loaded[0]
    yield ()


def library(command: Sequence[str], threads: Sequence[str]) -> ctypes.CDLL:
    """Load the kernels: from the cache if they were built there with the same source, compiler and options, else compiled.

    A library's name in the cache ends in the digest of its content. One that has other content, that belongs to somebody else
    or lies where others may write is not loaded but built again. What is loaded is a private copy of the bytes that were
    checked, so that nobody can change them in between.

    Args:
        command: The compiler.
        threads: Its options for threads.

    Raises:
        OSError: There is no such compiler, no place to build in, or the library cannot be loaded.
        subprocess.SubprocessError: The compiler failed.
    """
    options = ["-O3", "-fPIC", "-shared", *_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ()), *threads]
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *command, *options]).encode()).hexdigest()[:16]
    folder = _private_folder()
    writable = folder is not None and os.access(folder, os.W_OK)
    with tempfile.TemporaryDirectory(dir=folder if writable else None) as scratch:
        private = Path(scratch) / "kernels.so"
        content = None if folder is None else _cached(folder, key)
        if content is None:
            build = [*command, str(SOURCE), "-o", str(private), *options, "-lm"]
            subprocess.run(build, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
            if folder is not None:
                _keep(private, folder, key)
        else:
            private.write_bytes(content)
        return ctypes.CDLL(str(private), mode=os.RTLD_NOW)


def _private_folder() -> Path | None:
    """The cache's folder, made if need be; ``None`` where there is none or others could put libraries into it."""
    folder = cache_dir() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    return folder if stat.S_ISDIR(found.st_mode) and _is_ours(found) else None


def _is_ours(found: os.stat_result) -> bool:
    """Whether only this user, or the administrator, can have written a file."""
    return hasattr(os, "getuid") and found.st_uid in (0, os.getuid()) and not found.st_mode & _OTHERS_WRITE


def _cached(folder: Path, key: str) -> bytes | None:
    """Content of the library with a key, if it is still what was put there."""
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        try:
            # Not through a link; and a pipe, say, must not keep the process waiting.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                state = os.fstat(file.fileno())
                if not stat.S_ISREG(state.st_mode) or not _is_ours(state):
                    continue
                content = file.read()
        except OSError:
            continue
        if path.stem.rpartition("-")[2] == _digest(content):
            return content
    return None


def _keep(built: Path, folder: Path, key: str) -> None:
    """Put a library into the cache under the name of its content, whole or not at all; without room there, do without."""
    copy = built.with_name("copy.so")
    try:
        copy.write_bytes(built.read_bytes())
        copy.chmod(0o600)
        copy.replace(folder / f"kernels-{key}-{_digest(built.read_bytes())}.so")
    except OSError:
        copy.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

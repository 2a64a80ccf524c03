"""New processes for tests: forks of one that has imported what takes long, or interpreters of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

# What a new process imports first takes ten times as long as most of what it then does.
_PRELOADED = ["torch", "lightning.pytorch", "pytest", "lightning_peft.testing"]


def start_process(target: Callable[..., object], *arguments: Any, fresh: bool = False) -> BaseProcess:
    """Call ``target(*arguments)`` in a new process.

    Args:
        target: A function that can be imported.
        arguments: What can be pickled.
        fresh: Start an interpreter that imports everything anew and orders its sets in its own way. Without it the process
            is a fork of one that has imported torch and Lightning (where the system can fork), which starts ten times as
            fast.

    Returns:
        The process, started.
    """
    forks = not fresh and "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(_PRELOADED)
    process: BaseProcess = context.Process(target=target, args=arguments)
    with _no_main():
        process.start()
    return process


def settle(environment: Mapping[str, str], output: str, errors: str) -> None:
    """Make of a new process, which may be a fork, one that was started with an environment and writes to two files."""
    for number, file in enumerate((output, errors), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # a fork was told to start its own children as it was started


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Keep multiprocessing from running the script that asks for a process once more in it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main

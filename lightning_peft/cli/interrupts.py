"""Commands that are told to stop, by Ctrl-C or by SIGTERM: both end them in one way, with one line on how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

AGAIN = "The same command goes on from there."


class Interrupted(KeyboardInterrupt):
    """A command was stopped; the message says how to go on."""


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, with which schedulers and `kill` end a process, do what Ctrl-C does.

    Python itself would die without a word, and Lightning listens only while a Trainer works.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may listen
        yield
        return
    own = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a worker that was forked off, and is stopped by who started it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def going_on(how: Callable[[], str]) -> Iterator[None]:
    """Say how to go on when what is done here is stopped.

    Args:
        how: Called then; returns a sentence.

    Raises:
        Interrupted: It was stopped.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(how()) from None

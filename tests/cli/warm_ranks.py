"""Processes of a training as forks of one that has imported torch and Lightning, in place of new interpreters."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import warm_python


class WarmRank:
    """What :mod:`lightning_peft.cli.processes` needs of a ``subprocess.Popen``, around such a fork.

    Args:
        folder: The folder that the process is told of; pipes are made in it.
        environment: Its environment.
        log: Where it is to write; ``None`` for pipes.
    """

    returncode: int | None = None

    def __init__(self, folder: Path, environment: Mapping[str, str], log: IO[bytes] | None) -> None:
        names = [folder / f"{name}-{environment['LOCAL_RANK']}" for name in ("in", "out", "err")]
        for name in names if log is None else names[:1]:
            os.mkfifo(name)
        said = names[1:] if log is None else [Path(log.name)] * 2
        code = f"import os, runpy; os.dup2(os.open({str(names[0])!r}, os.O_RDONLY), 0); os.setsid(); import sys; "
        code += f"sys.argv = ['rank', {str(folder)!r}]; runpy.run_module('lightning_peft.cli.rank', run_name='__main__')"
        self._process = warm_python.start("-c", code, env=environment, said=said)
        self.pid = self._process.pid
        self.stdout, self.stderr = (name.open("rb") if log is None else None for name in names[1:])
        self.stdin = names[0].open("wb")
        self._ended = threading.Event()
        threading.Thread(target=self._join, daemon=True).start()

    def _join(self) -> None:
        self._process.join()
        self.returncode = self._process.exitcode
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_warm(folder: Path, environment: Mapping[str, str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Stands in for ``lightning_peft.cli.processes._start``."""
    return WarmRank(folder, environment, log)  # type: ignore[return-value]

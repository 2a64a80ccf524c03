"""Trainings in several processes: all of them are started, heard and ended here.

Lightning's own launcher would run the user's command once more in each, looks after them every five seconds, and leaves them
alone when the first one dies.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from rich.console import Console

from lightning_peft.cli.job import Job
from lightning_peft.cli.messages import RankError
from lightning_peft.cli.recipes import UsageError
from lightning_peft.contract import methods_of
from lightning_peft.strategies.sharding import check_layout
from lightning_peft.strategies.support import check_strategy, shards, strategy_kind

JOB, ERROR = "job.json", "error-{}.json"
KINDS = ("ddp", "fsdp2")
GRACE = 5.0
"""Seconds in which processes that are told to stop may do so by themselves."""


def processes_of(trainer: Trainer) -> int:
    """Return how many processes to start for a Trainer; none where it works in this one.

    Raises:
        UsageError: They cannot be started here, or would write folders of shards.
        MisconfigurationException: A method does not work under the strategy.
    """
    kind, strategy = strategy_kind(trainer.strategy), trainer.strategy
    methods = list(methods_of(trainer.callbacks))  # type: ignore[attr-defined]
    check_strategy(trainer, methods)
    if trainer.world_size == 1 and kind not in KINDS:
        return 0
    asks = f"The Trainer asks for {trainer.world_size} processes under {type(strategy).__name__}"
    alone = "Or train in one: --trainer.devices 1 --trainer.strategy auto."
    if kind not in KINDS:
        raise UsageError(f"{asks}. This command trains under DDPStrategy and ModelParallelStrategy. {alone}")
    environment: Any = trainer._accelerator_connector.cluster_environment
    if environment.creates_processes_externally or trainer.num_nodes > 1:
        raise UsageError(
            f"{asks}, on {trainer.num_nodes} machines or started from elsewhere. This command starts all of them itself, on "
            "one machine: give it without torchrun or srun before it, or train with LightningCLI, which reads the same file."
        )
    if not isinstance(strategy.launcher, _SubprocessScriptLauncher):
        raise UsageError(f"{asks}, which forks or spawns functions. Choose --trainer.strategy ddp. {alone}")
    if shards(strategy):
        check_layout(strategy, methods, may_split=False)
        if strategy._save_distributed_checkpoint:  # type: ignore[attr-defined]
            raise UsageError(
                f"{asks}, with checkpoints that are folders of shards. This command keeps files, which it bakes and reports "
                "on: add --trainer.strategy.save_distributed_checkpoint false."
            )
    return trainer.world_size


def train_in_processes(job: Job, made_with: str, count: int, console: Console) -> None:
    """Do a job in processes of their own, in each of which :mod:`lightning_peft.cli.rank` does its part.

    Args:
        job: The job.
        made_with: See :meth:`lightning_peft.cli.training.Training.run`.
        count: Number of processes.
        console: Where to show what the first one prints.

    Raises:
        RankError: A process failed; the others are stopped.
        KeyboardInterrupt: The user stopped it; the last checkpoint is in place.
    """
    with TemporaryDirectory(prefix="lightning-peft-") as place:
        folder = Path(place)
        (folder / JOB).write_text(json.dumps({"job": job.to_json(), "made_with": made_with}))
        with _started(folder, count, console) as processes:
            rank, status = _first_failure(processes)
        if status:
            raise _error(folder, rank, status, count)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Wait until all have ended well, or one has not; return its rank and status. The others fail because it is gone."""
    ended: SimpleQueue[tuple[int, int]] = SimpleQueue()

    def wait(rank: int) -> None:
        ended.put((rank, processes[rank].wait()))

    for rank in range(len(processes)):
        threading.Thread(target=wait, args=(rank,), daemon=True).start()
    rank = status = 0
    for _ in processes:
        rank, status = ended.get()
        if status:
            break
    return rank, status


@contextlib.contextmanager
def _started(folder: Path, count: int, console: Console) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the processes, show what the first one prints, and leave none behind."""
    environment = _environment(count, console)
    processes: list[subprocess.Popen[bytes]] = []
    heard: list[threading.Thread] = []
    try:
        for rank in range(count):
            with (folder / _log(rank)).open("wb") as log:
                processes.append(_start(folder, {**environment, "LOCAL_RANK": str(rank)}, None if rank == 0 else log))
        first = processes[0]
        heard = [_pass_on(first.stdout, lambda: console.file), _pass_on(first.stderr, lambda: sys.stderr)]
        yield processes
    finally:
        _stop(processes)
        for thread in heard:
            thread.join(GRACE)  # a loader's worker that is left would keep it open


def _log(rank: int) -> str:
    return f"rank-{rank}.log"


def _start(folder: Path, environment: Mapping[str, str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start one process; its standard input ends when this process does, however that happens, and it ends with it."""
    command = [sys.executable, "-m", "lightning_peft.cli.rank", str(folder)]
    said = subprocess.PIPE if log is None else log
    # A session of its own: what a terminal tells this command is passed on when and as it should be.
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True)


def _environment(count: int, console: Console) -> dict[str, str]:
    threads = max(1, torch.get_num_threads() // count)
    terminal = {"FORCE_COLOR": "1"} if console.is_terminal else {}
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        **terminal,
        "COLUMNS": str(console.width),
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
    }


def _pass_on(pipe: IO[bytes] | None, to: Callable[[], IO[str]]) -> threading.Thread:
    assert pipe is not None

    def copy() -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with pipe:
            for part in iter(partial(os.read, pipe.fileno(), 1 << 16), b""):
                to().write(decoder.decode(part))
                to().flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt what still works, and end what does not listen, such as one that waits for another."""
    left = [process for process in processes if process.poll() is None]
    try:
        for process in left:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE
        while any(process.poll() is None for process in left) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        for process in processes:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # workers of its loaders
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _error(folder: Path, rank: int, status: int, count: int) -> RankError:
    """Return what a process that failed said, or how it ended."""
    path = folder / ERROR.format(rank)
    if path.is_file():
        said = json.loads(path.read_text())
        error = RankError(said["message"])
        error.__cause__ = RuntimeError(f"in process {rank}:\n{said['traceback']}")
        return error
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    memory = ", as a system that runs out of memory does it" if status == -signal.SIGKILL else ""
    lines = (folder / _log(rank)).read_text(errors="replace").strip().splitlines()
    last = f" Its last words: {lines[-1]}" if lines else ""
    return RankError(f"Process {rank} of {count} {how}{memory}; the others were stopped. The last whole epoch is kept.{last}")

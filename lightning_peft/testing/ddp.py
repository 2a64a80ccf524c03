"""Runs a function in several processes that a Trainer takes for its own, over gloo on this machine."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_peft.testing.processes import settle, start_process

_PORT_TAKEN = ("address already in use", "eaddrinuse")


def run_ddp(
    function: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    processes: int = 2,
    timeout: float = 270.0,
    fresh: bool = False,
) -> list[Any]:
    """Call ``function(**arguments)`` in each of several new processes and return what they return, by rank.

    Inside, ``Trainer(accelerator="cpu", devices=processes, strategy="ddp")`` joins the group; its gloo backend comes with
    the accelerator.

    Args:
        function: ``"package.module:function"`` or ``"path/to/file.py:function"``.
        arguments: Keyword arguments, plain data.
        processes: Number of ranks.
        timeout: Seconds until all of them are ended.
        fresh: Start every rank as an interpreter of its own, which imports everything anew and orders its sets in its own
            way, as the ranks of a real training do. Without it ranks are forks of one process that has imported torch and
            Lightning (where the system can fork), which start ten times as fast.

    Returns:
        The results, plain data, one per rank; ``None`` of one that ended itself with status 0.

    Raises:
        RuntimeError: A rank failed or the time ran out; the message ends with the output of the ranks.
    """
    for attempt in range(3):
        with tempfile.TemporaryDirectory() as folder:
            codes = _launch(function, arguments or {}, processes, timeout, fresh, Path(folder))
            logs = [Path(folder, f"{rank}.log").read_text(errors="replace") for rank in range(processes)]
            if all(code == 0 for code in codes):
                outs = [Path(folder, f"{rank}.out") for rank in range(processes)]
                return [torch.load(out, weights_only=True) if out.is_file() else None for out in outs]
        if attempt < 2 and any(text in log.lower() for log in logs for text in _PORT_TAKEN):
            continue  # somebody took the port between our look and our use
        break
    tails = "\n".join(f"--- rank {rank}, exit status {codes[rank]}\n{log[-6000:]}" for rank, log in enumerate(logs))
    raise RuntimeError(f"{function} failed in {processes} processes (time limit {timeout:.0f} s).\n{tails}")


def _launch(
    function: str, arguments: Mapping[str, Any], processes: int, timeout: float, fresh: bool, folder: Path
) -> list[int | None]:
    torch.save(dict(arguments), folder / "arguments")
    shared = {
        # A seed that somebody gave this process (Lightning keeps it there) would deal samples to ranks in another order.
        **{name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"},
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "NODE_RANK": "0",
    }
    started: list[BaseProcess] = []
    try:
        for rank in range(processes):
            Path(folder, f"{rank}.log").touch()
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(start_process(_run_rank, function, str(folder), environment, fresh=fresh))
        deadline = time.monotonic() + timeout
        # One rank that failed leaves the others waiting for it: no need to wait with them.
        while any(p.exitcode is None for p in started) and not any(p.exitcode for p in started) and time.monotonic() < deadline:
            time.sleep(0.02)
        if all(process.exitcode is None for process in started):
            _tell_stacks(started)
    finally:
        for process in started:
            _end(process)
    return [process.exitcode for process in started]


def _tell_stacks(started: list[BaseProcess]) -> None:
    """Have ranks that hang write where they are to their log."""
    if os.name == "posix":
        for process in started:
            os.kill(process.pid or 0, signal.SIGUSR1)
        time.sleep(1.0)


def _end(process: BaseProcess) -> None:
    if process.pid is None:
        return
    if process.exitcode is None:
        process.kill()
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):  # it had not yet become a group of its own
                os.killpg(process.pid, signal.SIGKILL)  # with loader workers of its own
    process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def load_module(source: str) -> Any:
    """Import a module by name or from a file, as a new process has to."""
    if not source.endswith(".py"):
        return import_module(source)
    name = Path(source).stem
    spec = spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be imported.")
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _run_rank(function: str, folder: str, environment: Mapping[str, str]) -> None:
    """The function that each process runs."""
    if os.name == "posix":
        os.setsid()
    rank = environment["RANK"]
    log = str(Path(folder, f"{rank}.log"))
    settle(environment, log, log)
    rank_zero_only.rank = int(rank)  # type: ignore[attr-defined]  # a fork imported this before it was a rank
    torch.set_num_threads(1)
    if os.name == "posix":
        faulthandler.register(signal.SIGUSR1)
    source, _, name = function.rpartition(":")
    arguments = torch.load(Path(folder, "arguments"), weights_only=True)
    result = getattr(load_module(source), name)(**arguments)
    torch.save(result, Path(folder, f"{rank}.out"))
    _leave()


def _leave() -> None:
    """End this rank: Lightning leaves a gloo group open, whose threads can abort a process that the interpreter leaves."""
    if dist.is_initialized():
        dist.barrier()  # rank 0 keeps the store that the others still need to leave
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

"""Runs a function in several processes that a Trainer takes for its own, over gloo on this machine."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PORT_TAKEN = ("address already in use", "eaddrinuse")


def run_ddp(
    function: str, arguments: Mapping[str, Any] | None = None, *, processes: int = 2, timeout: float = 270.0
) -> list[Any]:
    """Call ``function(**arguments)`` in each of several new processes and return what they return, by rank.

    Inside, ``Trainer(accelerator="cpu", devices=processes, strategy="ddp")`` joins the group; its gloo backend comes with
    the accelerator.

    Args:
        function: ``"package.module:function"`` or ``"path/to/file.py:function"``.
        arguments: Keyword arguments, plain data.
        processes: Number of ranks.
        timeout: Seconds until all of them are ended.

    Returns:
        The results, plain data, one per rank.

    Raises:
        RuntimeError: A rank failed or the time ran out; the message ends with the output of the ranks.
    """
    for attempt in range(3):
        with tempfile.TemporaryDirectory() as folder:
            codes = _launch(function, arguments or {}, processes, timeout, Path(folder))
            logs = [Path(folder, f"{rank}.log").read_text(errors="replace") for rank in range(processes)]
            if all(code == 0 for code in codes):
                return [torch.load(Path(folder, f"{rank}.out"), weights_only=True) for rank in range(processes)]
        if attempt < 2 and any(text in log.lower() for log in logs for text in _PORT_TAKEN):
            continue  # somebody took the port between our look and our use
        break
    tails = "\n".join(f"--- rank {rank}, exit status {codes[rank]}\n{log[-6000:]}" for rank, log in enumerate(logs))
    raise RuntimeError(f"{function} failed in {processes} processes (time limit {timeout:.0f} s).\n{tails}")


def _launch(function: str, arguments: Mapping[str, Any], processes: int, timeout: float, folder: Path) -> list[int | None]:
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
    command = [sys.executable, "-c", "from lightning_peft.testing import ddp; ddp.main()", function, str(folder)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            with (folder / f"{rank}.log").open("wb") as log:
                environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=os.name == "posix")
                )
        deadline = time.monotonic() + timeout
        # One rank that failed leaves the others waiting for it: no need to wait with them.
        while any(p.poll() is None for p in started) and not any(p.poll() for p in started) and time.monotonic() < deadline:
            time.sleep(0.05)
        if all(process.poll() is None for process in started):
            _tell_stacks(started)
    finally:
        for process in started:
            _end(process)
    return [process.returncode for process in started]


def _tell_stacks(started: list[subprocess.Popen[bytes]]) -> None:
    """Have ranks that hang write where they are to their log."""
    if os.name == "posix":
        for process in started:
            process.send_signal(signal.SIGUSR1)
        time.sleep(1.0)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)  # with loader workers of its own
    else:
        process.kill()
    process.wait()


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


def main() -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    if os.name == "posix":
        faulthandler.register(signal.SIGUSR1)
    source, _, name = sys.argv[1].rpartition(":")
    folder = Path(sys.argv[2])
    arguments = torch.load(folder / "arguments", weights_only=True)
    result = getattr(load_module(source), name)(**arguments)
    torch.save(result, folder / f"{os.environ['RANK']}.out")
    _leave()


def _leave() -> None:
    """End this rank: Lightning leaves a gloo group open, whose threads can abort a process that the interpreter leaves."""
    if dist.is_initialized():
        dist.barrier()  # rank 0 keeps the store that the others still need to leave
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

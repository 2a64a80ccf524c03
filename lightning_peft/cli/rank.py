"""One of the processes that share a training, started by :mod:`lightning_peft.cli.processes` with the folder of the job."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from lightning_peft.cli.job import Job
from lightning_peft.cli.launch import quiet_lightning
from lightning_peft.cli.messages import message_of, silence
from lightning_peft.cli.processes import ERROR, JOB
from lightning_peft.cli.training import Training


def main(folder: Path) -> int:
    """Do this process's part of the job, and leave a message where that fails.

    Returns:
        Exit code: 0 done, 2 an error, 130 interrupted.
    """
    rank = int(os.environ["LOCAL_RANK"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_lightning()
    silence()
    if rank:
        warnings.simplefilter("ignore")  # the first one says the same
    try:
        task = json.loads((folder / JOB).read_text())
        Training(Job.from_json(task["job"]), Console(quiet=rank > 0)).run(task["made_with"])
        dist.barrier()  # the first keeps the store that the others still need to leave
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:
        ended = f"ended early, with exit code {error.code}" if isinstance(error, SystemExit) else message_of(error)
        said = {"message": ended, "traceback": traceback.format_exc()}
        (folder / ERROR.format(rank)).write_text(json.dumps(said))
        return 2
    return 0


def _end_with_parent() -> None:
    """Wait until nothing holds the other end of standard input any more; nobody else would end this process then."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a gloo group can abort a process that the interpreter leaves, and say so

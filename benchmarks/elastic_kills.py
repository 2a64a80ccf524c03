"""Kills ranks of tiny trainings under torchrun, which starts them again, and compares what comes of it with what no kill does.

    python benchmarks/elastic_kills.py --kills 50

Every run draws a combination of methods as ``kills.py`` does, and trains it with DDP in two processes of torchrun. Then it
trains it again while one rank or the other ends itself by SIGKILL, in a drawn step, before or after the optimizer's. torchrun
ends the other rank and starts both, which go on from the last checkpoint. Weights of both ranks, and the optimizer, scheduler,
journal and the states of the methods, must agree bit for bit in the end.

In torch 2.15 ranks with gloo that torchrun starts again wait for each other for ever when they share its store, with Lightning
or without; they are given one of their own here.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kills import BATCHES, EPOCHS, Killed, combination, resumed
from torch.utils.data import DataLoader

from lightning_peft.testing.modules import Plain, deepened, loader
from lightning_peft.testing.runs import resumable
from lightning_peft.testing.trace import difference

RANKS = 2
TOGETHER = 3  # kills of one training
LIMIT = 300  # seconds that a training may take with its kills


def of_rank(rank: int) -> DataLoader[Any]:
    """The same samples in every batch, others on every rank."""
    samples = loader(8)
    return DataLoader(samples.dataset, batch_sampler=[list(range(4 * rank, 4 * rank + 4))] * BATCHES)


def deaths(draw: random.Random, count: int) -> list[tuple[int, Killed]]:
    """Which rank ends itself in each attempt, and in which of its steps."""
    return [
        (draw.randrange(RANKS), Killed(draw.randint(1, EPOCHS * BATCHES // TOGETHER), draw.random() < 0.5))
        for _ in range(count)
    ]


def work(folder: Path, seed: str, kills: int) -> None:
    """Train as one rank that torchrun started."""
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    draw = random.Random(seed)
    methods = [make() for make in combination(draw)]
    after = [killer for dies, killer in deaths(draw, kills)[attempt : attempt + 1] if dies == rank]
    settings = {"devices": RANKS, "strategy": "ddp", "use_distributed_sampler": False}
    run = resumed(methods, folder, attempt + 5 * kills, after, style=deepened(Plain), data=of_rank(rank), **settings)
    run.trainer.save_checkpoint(folder / "end.ckpt")
    torch.save(dict(run.module.state_dict()), folder / f"rank{rank}.pt")


def launched(folder: Path, seed: str, kills: int) -> dict[str, Any]:
    """Let torchrun train to the end, and return what is there then.

    Raises:
        RuntimeError: It did not reach the end.
    """
    folder.mkdir()
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={kills}"]
    command = [sys.executable, *run, __file__, "--folder", str(folder), "--seed", seed, "--kills", str(kills)]
    own = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}:\n{done.stderr[-3000:]}")
    ranks = {str(rank): torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)}
    return resumable(torch.load(folder / "end.ckpt", weights_only=True)) | ranks


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills of all trainings together")
    parser.add_argument("--seed", default="0", help="seed of what is drawn")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    arguments = parser.parse_args()
    if arguments.folder:
        return work(arguments.folder, arguments.seed, arguments.kills)
    same, killed, start = 0, 0, time.monotonic()
    for number in range(-(-arguments.kills // TOGETHER)):
        seed, count = f"{arguments.seed}-{number}", min(TOGETHER, arguments.kills - killed)
        with tempfile.TemporaryDirectory() as place:
            whole = launched(Path(place, "whole"), seed, 0)
            found = difference(whole, launched(Path(place, "killed"), seed, count))
        same, killed = same + (found is None), killed + count
        name = " + ".join(repr(make()) for make in combination(random.Random(seed)))
        print(f"{name}: {count} kills, {'the same, bit for bit' if found is None else found}", flush=True)
    print(f"{same} of {number + 1} runs the same after {killed} kills in {time.monotonic() - start:.0f} s")
    sys.exit(same != number + 1)


if __name__ == "__main__":
    main()

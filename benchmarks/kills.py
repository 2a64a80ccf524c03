"""Kills tiny trainings at random moments, resumes them, and compares what comes of them with the same training left alone.

    python benchmarks/kills.py --runs 60

Every run draws a combination of methods and trains it once to the end. Then it trains it again in a process of its own that is
ended by SIGKILL at random moments, while it trains, saves or starts, and goes on from its last checkpoint each time. Weights,
optimizers, schedulers, journal and the states of the methods must agree bit for bit in the end. Batches are the same in every
epoch, so that where in an epoch a run resumes makes no difference to the data.

Nothing is saved between an epoch's last batch and its end: a training that is resumed from there and interrupted again takes
steps too many in Lightning 2.6, with methods or without (stops at steps 4 and 6 of 3 epochs of 4 batches make 14 steps of 12).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_peft import (
    GBLM,
    PERP,
    PSKD,
    SAP,
    BlockPruning,
    GroupEnvelope,
    LayerGrowth,
    MaskedPruning,
    Method,
    NMSparsity,
    StageSharing,
    TrainedRankPruning,
    WeightCompander,
)
from lightning_peft.structure.checkpoint import CheckpointError
from lightning_peft.testing.modules import Plain, deepened, loader
from lightning_peft.testing.runs import Fit, fit
from lightning_peft.testing.trace import difference

EPOCHS, BATCHES = 3, 4
Make = Callable[[], Method]
Train = Callable[[Path, int], None]
"""Trains to the end in a folder, from the last checkpoint if there is one; the number is that of the attempt."""

STRUCTURE: list[Make | None] = [
    None,
    lambda: LayerGrowth(at="step:5", start=2),
    lambda: LayerGrowth("zero", at="step:3", start=2, lr="rewarm:4"),
    lambda: StageSharing(2, at="step:6"),
    lambda: BlockPruning(0.5, start=3, end=8, every=2),
]
MASKS: list[Make | None] = [
    None,
    lambda: NMSparsity("2:4"),
    lambda: NMSparsity("2:4", recipe="one-shot", dense=4),
    lambda: NMSparsity("1:4", recipe="sr-ste", refresh=3),
    lambda: MaskedPruning(0.5, end=8, every=2),
    lambda: GBLM(0.5, end=8, every=2),
    lambda: GroupEnvelope(0.5, end=8),
]
REPARAMETRISATIONS: list[Make | None] = [None, WeightCompander]
TERMS: list[Make | None] = [None, PSKD, lambda: PSKD(teacher="copy")]
ALONE: list[list[Make]] = [[TrainedRankPruning], [lambda: SAP(start=3, every=3, end=9)], [lambda: PERP(rank=2)]]


def combination(draw: random.Random) -> list[Make]:
    """Draw methods that go together, at least one."""
    if draw.random() < 0.2:
        return draw.choice(ALONE)
    while True:
        chosen = [draw.choice(kind) for kind in (STRUCTURE, MASKS, REPARAMETRISATIONS, TERMS)]
        if any(chosen):
            return [make for make in chosen if make is not None]


def same_batches(template: DataLoader[Any]) -> DataLoader[Any]:
    """Every batch holds the same samples of a loader's data."""
    sampler = [list(range(8))] * BATCHES
    return DataLoader(template.dataset, batch_sampler=sampler, collate_fn=template.collate_fn)


class Saver(ModelCheckpoint):
    """Saves after every batch but an epoch's last, and at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, every_n_train_steps=1, save_last=True, save_top_k=1)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class Killed(Callback):
    """Ends the process by SIGKILL in a step, before or after the optimizer's."""

    def __init__(self, step: int, before: bool) -> None:
        self.left, self.before = step, before

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.left -= 1
        if self.before and not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def resumed(methods: list[Method], folder: Path, attempt: int, after: Sequence[Callback] = (), **settings: Any) -> Fit:
    """Train to the end, from the last checkpoint if there is one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    last = folder / "last.ckpt"
    found = last if last.exists() else None
    # What is drawn after a resume must come from the checkpoint, so the seed is another one.
    seed, callbacks = attempt if found else 0, [*after, Saver(folder)]
    return fit(methods, seed=seed, after=callbacks, resume=found, max_epochs=EPOCHS, **settings)


def train(methods: list[Method], folder: Path, attempt: int, after: Sequence[Callback] = (), **settings: Any) -> Fit:
    """Train to the end, from the last checkpoint if there is one, and write what came of it."""
    run = resumed(methods, folder, attempt, after, **settings)
    torch.save(run.state() | {"module": dict(run.module.state_dict())}, folder / "part")
    (folder / "part").rename(folder / "final.pt")
    return run


def attempt(train: Train, folder: Path, number: int, kill_after: float | None = None) -> tuple[bool, float]:
    """Train in a process of its own; return whether it reached the end, and how long it ran."""
    process = multiprocessing.get_context("fork").Process(target=_guarded, args=(train, folder, number))
    start = time.monotonic()
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise CheckpointError(f"attempt {number} failed with exit status {process.exitcode}:\n{_error(folder)}")
    return process.exitcode == 0, time.monotonic() - start


def _guarded(train: Train, folder: Path, number: int) -> None:
    try:
        train(folder, number)
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


def _error(folder: Path) -> str:
    path = folder / "error.txt"
    return path.read_text(encoding="utf-8")[-3000:] if path.exists() else "no word"


def run_once(draw: random.Random, folder: Path, kills: int) -> tuple[str, int, str | None]:
    """Return the methods of one run, how often it was killed, and the first difference."""
    makes = combination(draw)

    def tiny(folder: Path, number: int) -> None:
        train([make() for make in makes], folder, number, style=deepened(Plain), data=same_batches(loader(8)))

    name = " + ".join(repr(make()) for make in makes)
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    _, seconds = attempt(tiny, whole, 0, None)
    ended, count = False, 0
    while not ended:
        last = count >= kills
        ended, _ = attempt(tiny, killed, count + 5, None if last else draw.uniform(0.1, 1.0) * seconds)
        count += not ended
    states = [torch.load(path / "final.pt", weights_only=True) for path in (whole, killed)]
    return name, count, difference(*states)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="trainings to draw")
    parser.add_argument("--kills", type=int, default=3, help="kills of one training at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn")
    arguments = parser.parse_args()
    same, killed, start = 0, 0, time.monotonic()
    for number in range(arguments.runs):
        draw = random.Random(f"{arguments.seed}-{number}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                name, count, found = run_once(draw, Path(folder), arguments.kills)
            except CheckpointError as error:
                name, count, found = "", 0, str(error)
        same, killed = same + (found is None), killed + count
        print(f"{number}: {name}: {count} kills, {'the same, bit for bit' if found is None else found}", flush=True)
    print(f"{same} of {arguments.runs} runs the same after {killed} kills in {time.monotonic() - start:.0f} s")
    sys.exit(same != arguments.runs)


if __name__ == "__main__":
    main()

"""Optimizer steps against batches, in modules that optimise by hand."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.compose.run import Run

TOLERANCE = 0.05
"""Share of a length by which it may be off before anybody is told: single steps are left out now and then."""


class Pace:
    """Counts what an epoch really has, since only the module knows how many batches it makes a step of.

    Schedules are laid out before the first step, for one step of the first optimizer a batch. A module under manual
    optimization may take fewer or more, and only an epoch of it can tell; then this says how to give the training its true
    length.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._told = False
        self._begin()

    def _begin(self) -> None:
        self._batches = 0
        self._steps: dict[int, int] = {}

    def batch(self) -> None:
        """Count a batch."""
        self._batches += 1

    def step(self, optimizer: int) -> None:
        """Count a step of one optimizer, by its place among them."""
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1

    def end_epoch(self) -> None:
        """Hold the epoch against what schedules were laid out for, and warn once when they will not fit."""
        run, batches, steps = self._run, self._batches, self._steps
        self._begin()
        whole = batches > 0 and batches == run.trainer.num_training_batches
        if self._told or run.module.automatic_optimization or not whole or not steps.get(0):
            return
        found = self._of_total(steps) if run.asked_total else None
        if found is None and run.asked_epoch and _differ(steps[0], batches):
            found = (
                "points in epochs were placed for one step a batch. Write them in optimizer steps, of which an epoch has "
                f"{steps[0]}."
            )
        if found is not None:
            self._told = True
            counted = (
                f"takes {steps[0]} step{'s' if steps[0] > 1 else ''} of its first optimizer in an epoch of {batches} batches"
            )
            rank_zero_warn(f"{type(run.module).__name__} {counted}, and {found}")

    def _of_total(self, steps: Mapping[int, int]) -> str | None:
        """Compare the whole training with what was assumed of it, from an epoch's steps by optimizer."""
        trainer, assumed = self._run.trainer, self._run.end
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        lengths = [] if epochs is None else [steps[0] * epochs]
        lengths += [] if trainer.max_steps < 0 else [trainer.max_steps * steps[0] // sum(steps.values())]
        real = min(lengths, default=0)
        if assumed is None or not lengths or not _differ(real, assumed):
            return None
        outcome = "end too early" if assumed < real else f"stop at {real / assumed:.0%} of their course"
        found = f"schedules laid out for {assumed} steps will {outcome}, because the training has {real}. "
        if set(steps) != set(range(self._run.optimizers)) or len(set(steps.values())) > 1:
            return found + "Write points of training in steps of the first optimizer."
        limits = f"max_epochs={epochs}" if epochs is not None and real < assumed else "max_epochs=-1"
        return found + f"Train with Trainer({limits}, max_steps={real * len(steps)}), which counts the steps of all optimizers."


def _differ(real: int, assumed: int) -> bool:
    return abs(real - assumed) > max(1.0, TOLERANCE * assumed)

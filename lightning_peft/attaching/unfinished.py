"""A fit that ends before something it was to bring says so: growth that never came leaves a small network without a word."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract


def warn_unfinished(run: Run, methods: Iterable[Contract]) -> None:
    """Warn of everything that methods still wait for when a fit ends; a trial run (``fast_dev_run``) is not expected to end.

    Args:
        run: The fit that ends.
        methods: Its methods.
    """
    if run.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for method in methods:
        for event in method.awaited(run):
            rank_zero_warn(
                f"{method.name}: this fit ended after {run.step} optimizer steps in {run.trainer.current_epoch} epochs, before "
                f"{event}. Train on from its last checkpoint, or let it come earlier."
            )

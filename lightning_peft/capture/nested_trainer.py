"""A Trainer that runs a module's evaluation beside the user's own, and leaves nothing of it on the module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


def quiet_trainer(**settings: Any) -> Trainer:
    """Return a Trainer without logger, files or output.

    Args:
        **settings: Further arguments of the Trainer.
    """
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    with isolate_rng():  # a Trainer draws which tip it gives
        return Trainer(**quiet, **settings)


@contextmanager
def trainers_kept(module: LightningModule) -> Iterator[None]:
    """Give the modules within a module the Trainers back that they have now."""
    kept = [(part, part._trainer) for part in module.modules() if isinstance(part, LightningModule)]
    try:
        yield
    finally:
        for part, trainer in kept:
            part._trainer = trainer

"""Callbacks that watch or disturb a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Losses(Callback):
    """Records the loss the module logs, step by step; of a module that logs none, the one that was optimised."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        logged = trainer.callback_metrics.get("loss")
        self.losses.append(float(outputs["loss"] if logged is None else logged))


class StopAfter(Callback):
    """Ends a fit early but orderly, after the first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class PlannedError(RuntimeError):
    """The error that :class:`FailAt` raises."""


class FailAt(Callback):
    """Raises before a given optimizer step."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error or PlannedError(f"before step {step}")

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= self.step:
            raise self.error


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Keep ``epoch=<n>.ckpt`` of every epoch."""
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)

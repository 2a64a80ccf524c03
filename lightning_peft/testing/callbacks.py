"""Callbacks that watch or disturb a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_peft.structure.journal import journal_of
from lightning_peft.testing.modules import loader


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


class Beginning(Callback):
    """Ends a fit before its first step, and keeps what the module computes there, then with other plain weights loaded.

    Attributes:
        outputs: The module's outputs on one batch; the second only where the module has the structure its class builds.
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inputs = next(iter(loader()))[0]
        self.outputs.append(_evaluated(pl_module, inputs))
        if not journal_of(pl_module):
            torch.manual_seed(1)
            pl_module.load_state_dict(type(pl_module)().state_dict())
            self.outputs.append(_evaluated(pl_module, inputs))
        raise PlannedError


def _evaluated(module: Any, inputs: Tensor) -> Tensor:
    module.eval()
    with torch.no_grad():
        output: Tensor = module.logits(inputs)
    module.train()
    return output

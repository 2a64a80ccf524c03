"""Callbacks that watch or disturb a short training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_peft
from lightning_peft.testing.trace import trace


class Losses(Callback):
    """Records the loss the module logs, step by step."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))


class StopAfter(Callback):
    """Ends a fit early but orderly, after the first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class PlannedError(RuntimeError):
    """What :class:`FailAt` raises."""


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


class Probe(Callback):
    """Copies and bakes the module in the middle of its training, and keeps what each computes."""

    live: Tensor
    copied: Tensor
    baked: Tensor
    independent = False
    baked_shape: dict[str, Any]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != 6:
            return
        training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            self.live = pl_module(batch[0])
            twin = copy.deepcopy(pl_module)
            self.copied = twin(batch[0])
            twin = lightning_peft.bake(twin)
            self.baked = twin(batch[0])
            self.baked_shape = shape_of(twin)
            for parameter in twin.parameters():
                parameter.zero_()
            self.independent = torch.equal(pl_module(batch[0]), self.live)
        pl_module.train(training)


def shape_of(module: nn.Module) -> dict[str, Any]:
    """What tells an ordinary module from a mapped one: classes, parameter names in order, state-dict keys."""
    described = trace(module)
    return {key: described[key] for key in ("classes", "parameter order", "state")}

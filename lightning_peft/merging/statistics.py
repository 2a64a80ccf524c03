"""Running statistics of batch norms, estimated again with a module's own training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_peft.capture.nested_trainer import trainers_kept
from lightning_peft.capture.shim import Shim


def running_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def estimate_again(module: LightningModule, trainer: Trainer, loader: Any) -> None:
    """Let the batch norms of a module average the statistics of training batches anew.

    The module's ``training_step`` is called without gradients, all layers but the batch norms in evaluation mode.

    Args:
        module: The module, under automatic optimization.
        trainer: What runs it: its ``limit_val_batches`` batches are looked at.
        loader: The training data.
    """
    norms = running_norms(module)
    momenta = [norm.momentum for norm in norms]

    def step(inner: Callable[..., Any], batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            module.training_step(batch, batch_idx)

    shim = Shim(module, "validation_step", step).install()
    mode = _TrainNorms(norms)
    trainer.callbacks.append(mode)  # type: ignore[attr-defined]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
        with trainers_kept(module), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*shuffling enabled")
            trainer.validate(module, loader, verbose=False)
    finally:
        shim.remove()
        trainer.callbacks.remove(mode)  # type: ignore[attr-defined]
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class _TrainNorms(Callback):
    """Puts batch norms into training mode once the loop has put the module into evaluation mode."""

    def __init__(self, norms: list[_BatchNorm]) -> None:
        self._norms = norms

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for norm in self._norms:
            norm.train()

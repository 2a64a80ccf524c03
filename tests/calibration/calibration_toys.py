"""A module of four blocks, and calibration without a bar."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft.testing.modules import Plain, deepened, loader

Deep = deepened(Plain)


def deep(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Deep()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def calibrate(module: LightningModule, methods: Any, batches: Any = None, **settings: Any) -> list[str]:
    batches = loader() if batches is None else batches
    return lightning_peft.calibrate(module, methods, batches, **{"progress": False, "accelerator": "cpu", **settings})

"""The user's own training step, without the terms that methods add."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import LightningModule


def own_step(module: LightningModule, batch: Any, index: int) -> Any:
    """Call it with as many arguments as it takes."""
    count = len(inspect.signature(type(module).training_step).parameters) - 1
    return type(module).training_step(module, *(batch, index)[:count])

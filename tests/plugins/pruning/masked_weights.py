"""What tests of pruning by masks ask of weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

EVERYTHING: Any = ()


def pruned(module: nn.Module) -> dict[str, float]:
    """Share of zeros by weight."""
    return {name: float((p == 0).float().mean()) for name, p in module.named_parameters() if p.ndim > 1}


def weights(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.ndim > 1]

"""A say in what is trained."""

from __future__ import annotations

from torch import nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method


class ToyTuning(Method):
    """Trains the parameters whose names end as it is told, biases for one, and nothing else of the module."""

    lane = Lane.GRADIENT

    def __init__(self, ends: str = "bias", *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.ends = ends

    def trained(self, module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters() if name.endswith(self.ends)]

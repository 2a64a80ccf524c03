"""Weight maps that can be inverted, a mask, and the methods that put them on linear layers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.method import Method
from lightning_peft.weights.maps import WeightMap


class ScaleMap(WeightMap):
    """Multiplies a weight by a learned number; starts so that the layer computes what it did."""

    kind = "toy_scale"
    lane = Lane.REPARAM
    optimizer_overrides = {"weight_decay": 0.0}

    def __init__(self, start: float = 2.0) -> None:
        super().__init__()
        self.start = start
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Stored value under which the layer sees ``weight``."""
        return weight / self.scale

    def config(self) -> dict[str, Any]:
        return {"start": self.start}


class ToyScale(Method):
    """Weight map with a parameter of its own on every linear layer."""

    lane = Lane.REPARAM
    writes = frozenset({Resource.WEIGHT_MAP})
    weight_maps = (ScaleMap,)

    def __init__(
        self, scale: float = 2.0, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.scale = scale

    def attach(self, module: LightningModule) -> None:
        for name in self.claims(module):
            self.map_weight(module, name, ScaleMap(self.scale))


class ShiftMap(WeightMap):
    """Adds a learned number to a weight; what is stored is the rest, as where the principal part of a weight is trained."""

    kind = "toy_shift"
    lane = Lane.DELTA

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.start = start
        self.shift = nn.Parameter(torch.tensor(start))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Stored value under which the layer sees ``weight``."""
        return weight - self.shift

    def config(self) -> dict[str, Any]:
        return {"start": self.start}


class ToyShift(Method):
    """A second kind of map that can be inverted, for tensors that have one already."""

    lane = Lane.DELTA
    weight_maps = (ShiftMap,)

    def __init__(
        self, shift: float = 0.5, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.shift = shift

    def attach(self, module: LightningModule) -> None:
        for name in self.claims(module):
            self.map_weight(module, name, ShiftMap(self.shift))


class ThresholdMap(WeightMap):
    """Sets weights below a threshold to zero, and lets gradients reach all of them."""

    kind = "toy_threshold"
    lane = Lane.MASK

    def __init__(self, threshold: float = 0.05) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, weight: Tensor) -> Tensor:
        return weight - (weight * (weight.abs() < self.threshold)).detach()

    def bake(self, weight: Tensor) -> Tensor:
        return torch.where(weight.abs() < self.threshold, 0.0, weight)

    def config(self) -> dict[str, Any]:
        return {"threshold": self.threshold}


class ToyThreshold(Method):
    """Mask without parameters on every linear layer."""

    lane = Lane.MASK
    writes = frozenset({Resource.MASK})
    weight_maps = (ThresholdMap,)

    def __init__(
        self, threshold: float = 0.05, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.threshold = threshold

    def attach(self, module: LightningModule) -> None:
        for name in self.claims(module):
            self.map_weight(module, name, ThresholdMap(self.threshold))

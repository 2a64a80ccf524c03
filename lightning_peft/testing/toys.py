"""Small methods, one for each way of acting: a weight map, a mask, a loss term, a choice of what is trained.

They stand in for other people's methods wherever a test needs some, and are the shortest complete examples of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.loss import Step
from lightning_peft.compose.run import Run
from lightning_peft.method import Method
from lightning_peft.structure.forms import Form, fields, whole
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


class ToyEntropy(Method):
    """Loss term with state: rewards confident predictions, and counts the steps and epochs it took part in."""

    lane = Lane.LOSS
    reads = frozenset({Resource.LOGITS, Resource.SAMPLE_INDEX})

    def __init__(self, weight: float = 0.1, *, network: str | None = None, name: str | None = None) -> None:
        super().__init__(network=network, name=name)
        self.weight = weight
        self.seen: dict[str, Any] = {"optimizer_steps": 0, "epochs": 0, "last_index": torch.zeros(0, dtype=torch.int64)}

    def loss(self, step: Step) -> Tensor:
        self.seen["last_index"] = step.sample_index
        probabilities = step.logits.softmax(-1)
        return self.weight * (1 - probabilities.square().sum(-1)).mean()

    def after_step(self, run: Run) -> None:
        self.seen["optimizer_steps"] += 1

    def epoch_end(self, run: Run) -> None:
        self.seen["epochs"] += 1

    def metrics(self, run: Run) -> dict[str, float]:
        return {"optimizer_steps": float(self.seen["optimizer_steps"])}

    def state(self) -> dict[str, Any]:
        return dict(self.seen)

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"optimizer_steps": whole(), "epochs": whole(), "last_index": _indices})

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = dict(state)


def _indices(value: Any, place: str) -> str | None:
    fits = isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 1
    return None if fits else f"{place} is no vector of sample positions"


class ToyTuning(Method):
    """Trains the parameters whose names end as it is told, biases for one, and nothing else of the module."""

    lane = Lane.GRADIENT

    def __init__(self, ends: str = "bias", *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.ends = ends

    def trained(self, module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters() if name.endswith(self.ends)]

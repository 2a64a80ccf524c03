"""Small methods, one for each way of acting: a weight map, a mask, a layer part, a loss term.

They stand in for other people's methods wherever a test needs some, and are the shortest complete examples of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.loss import Step
from lightning_peft.compose.run import Run
from lightning_peft.method import Method
from lightning_peft.structure.forms import Form, fields, whole
from lightning_peft.weights.layer_part import LayerPart
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


class LowRankPart(LayerPart):
    """LoRA (Hu et al., ICLR 2022) beside a linear layer: ``x`` goes through two thin matrices, the weight is not touched.

    Args:
        inputs: Inputs of the layer.
        outputs: Outputs of the layer.
        rank: Rows of ``down``, ``(rank, inputs)``, and columns of ``up``, ``(outputs, rank)``.
        seed: Seed of ``down``; ``up`` starts at zero, so that the layer computes what it did.
    """

    kind = "toy_low_rank"
    lane = Lane.DELTA
    follows = {"down": {1: ("weight", 1)}, "up": {0: ("weight", 0)}}

    def __init__(self, inputs: int, outputs: int, rank: int = 2, seed: int = 0) -> None:
        super().__init__()
        self._config = {"inputs": inputs, "outputs": outputs, "rank": rank, "seed": seed}
        down = torch.randn(rank, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        return output + linear(linear(inputs, self.down), self.up)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight of a layer that computes the same by itself."""
        return weight + self.up @ self.down

    def config(self) -> dict[str, Any]:
        return self._config


class ToyLowRank(Method):
    """Layer part that can go into the weight, on every linear layer."""

    lane = Lane.DELTA
    parts = (LowRankPart,)

    def __init__(self, rank: int = 2, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.rank = rank

    def attach(self, module: LightningModule) -> None:
        for seed, (name, layer) in enumerate(self.select(module).items()):
            outputs, inputs = layer.weight.shape  # type: ignore[misc]
            self.put_part(module, name, LowRankPart(int(inputs), int(outputs), self.rank, seed))


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

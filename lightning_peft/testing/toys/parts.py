"""Modules beside layers: one that goes into the weight, one that cannot."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.weights.layer_part import LayerPart


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


class GatePart(LayerPart):
    """Multiplies every output of a linear layer by a learned number, which begins at 1."""

    kind = "toy_gate"
    lane = Lane.DELTA
    follows = {"gate": {0: ("weight", 0)}}

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(outputs))

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        return output * self.gate

    def config(self) -> dict[str, Any]:
        return {"outputs": len(self.gate)}


class ToyGate(Method):
    """Layer part that can go into no weight, on every linear layer.

    Args:
        checkpoint: ``"full"``, or ``"trained"`` for files that hold only what the fit changed.
        targets: Layers to gate.
        exclude: Layers to leave alone.
        name: Name in logs and checkpoints.
    """

    lane = Lane.DELTA
    parts = (GatePart,)

    def __init__(
        self,
        checkpoint: Literal["full", "trained"] = "full",
        *,
        targets: Any = "all-linear",
        exclude: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.checkpoint = checkpoint

    def attach(self, module: LightningModule) -> None:
        for name, layer in self.select(module).items():
            self.put_part(module, name, GatePart(len(layer.weight)))  # type: ignore[arg-type]

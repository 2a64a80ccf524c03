"""Pruning of a trained network, block after block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.structure.forms import Form, dict_of, fields, whole


class ToyWanda(Method):
    """Prunes each row of linear weights by ``|w|`` times the norm of its input (Sun et al., 2024), block after block."""

    lane = Lane.MASK

    def __init__(
        self, share: float = 0.5, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.share = share
        self.pruned: dict[str, int] = {}

    def calibrate(self, block: CalibrationBlock) -> None:
        layers: dict[str, Any] = block.inside(self.select(block.root))
        squares = {name: torch.zeros_like(layer.weight[0]) for name, layer in layers.items()}

        def add(name: str, inputs: Tensor) -> None:
            squares[name] += inputs.flatten(0, -2).square().sum(0)

        block.watch(layers, add)
        for name, layer in layers.items():
            scores = layer.weight.abs() * squares[name].sqrt()
            lowest = scores.argsort(dim=1, stable=True)[:, : int(self.share * scores.shape[1])]
            layer.weight.scatter_(1, lowest, 0.0)
            self.pruned[name] = lowest.numel()

    def state(self) -> dict[str, Any]:
        return {"pruned": dict(self.pruned)}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"pruned": dict_of(whole())})

    def load_state(self, state: dict[str, Any]) -> None:
        self.pruned = dict(state["pruned"])

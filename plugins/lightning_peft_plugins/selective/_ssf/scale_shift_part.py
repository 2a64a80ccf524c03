"""A scale and a shift beside a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Lane, LayerPart
from lightning_peft.weights.layer_part import Follows
from lightning_peft_plugins.selective.functional.ssf import scale_and_shift, scaled_weight, shifted_bias


class ScaleShiftPart(LayerPart):
    """Scales every channel that a layer returns, and shifts it where the layer has a bias for that to go into.

    It stands outside of deltas on the same layer, and scales what they add. A mask keeps its zeros.

    Args:
        count: Channels.
        axis: Their dimension in what the layer returns.
        dim: Their dimension in its weight.
        shifted: Whether there is a shift.
    """

    kind = "scale_shift"
    lane = Lane.DELTA
    order = 1
    keeps_zeros = True
    # As the official optimizers leave vectors without decay: to decay is to go to zero, and no scale is one.
    optimizer_overrides = {"weight_decay": 0.0}

    def __init__(self, count: int, axis: int, dim: int, shifted: bool) -> None:
        super().__init__()
        self.axis, self.dim = axis, dim
        self.scale = nn.Parameter(torch.ones(count))
        self.shift = nn.Parameter(torch.zeros(count)) if shifted else None

    @property
    def follows(self) -> Follows:  # type: ignore[override]
        """Both are cut with the channels."""
        found = {"scale": {0: ("weight", self.dim)}}
        return found if self.shift is None else found | {"shift": {0: ("bias", 0)}}

    def forward(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return scale_and_shift(output, self.scale, self.shift, self.axis)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight of a layer that computes the same by itself."""
        return scaled_weight(weight, self.scale, self.dim)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The bias of such a layer."""
        return bias if self.shift is None else shifted_bias(bias, self.scale, self.shift)

    def config(self) -> dict[str, Any]:
        return {"count": len(self.scale), "axis": self.axis, "dim": self.dim, "shifted": self.shift is not None}

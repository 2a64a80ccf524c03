"""A mask that is trained as a real number an entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Lane, WeightMap


class BinaryMask(WeightMap):
    """Sets the entries of a weight to zero whose real mask is not above a threshold; the mask gets the gradient of its bits.

    Args:
        shape: Shape of the weight.
        start: What real masks begin as.
        threshold: Above it an entry stays.

    Attributes:
        real: The real masks, in single precision beside weights of half precision.
    """

    kind = "binary_mask"
    lane = Lane.MASK
    optimizer_overrides = {"weight_decay": 0.0}  # it would pull every mask below the threshold

    def __init__(self, shape: Sequence[int], start: float, threshold: float) -> None:
        super().__init__()
        self.start, self.threshold = start, threshold
        self.real = nn.Parameter(torch.full(tuple(shape), start))

    def bits(self) -> Tensor:
        """What stays."""
        return self.real.detach() > self.threshold

    def forward(self, weight: Tensor) -> Tensor:
        through = (self.real - self.real.detach()).to(weight.dtype)  # zero, with the gradient of the bits
        return torch.where(self.bits(), weight, 0.0) + weight.detach() * through

    def bake(self, weight: Tensor) -> Tensor:
        return torch.where(self.bits(), weight, 0.0)

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.real.shape), "start": self.start, "threshold": self.threshold}

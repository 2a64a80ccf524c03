"""The weight map of pruning."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor

from lightning_peft import Lane
from lightning_peft.weights.hard_mask import hard_mask
from lightning_peft.weights.held import HeldMask
from lightning_peft.weights.shards import by_parts, spread_as


class Visibility(Protocol):
    """How layers see pruned weights at the moment; one object serves all maps of a method.

    Attributes:
        masked: Whether layers see pruned weights as zero.
        regrow: Whether pruned weights get the gradient too, so that they may come back.
    """

    masked: bool
    regrow: bool


class AlwaysMasked:
    """Pruned weights are zero for good."""

    masked, regrow = True, False


class MaskMap(HeldMask):
    """Sets pruned weights to zero; a weight without a mask is dense.

    Args:
        rule: What is in force at the moment; a map on its own (baking from a file) masks.
    """

    kind = "mask"
    lane = Lane.MASK

    def __init__(self, rule: Visibility | None = None) -> None:
        super().__init__()
        self.rule = rule or AlwaysMasked()

    def splits(self, weight: Tensor) -> bool:
        return True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.rule.masked or not self.holds(weight):
            return weight
        masked = partial(hard_mask, factor=self.factor(weight), regrow=self.rule.regrow)
        return by_parts(masked, weight, spread_as(weight, self.held))  # type: ignore[no-any-return]

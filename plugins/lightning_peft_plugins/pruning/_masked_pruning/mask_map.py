"""The weight map of pruning."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.compose.lanes import Lane
from lightning_peft.weights.hard_mask import hard_mask
from lightning_peft.weights.held import HeldMask


class PruneRule:
    """What all layers of one method do with pruned weights at the moment; one object serves many maps.

    Attributes:
        masked: Whether layers see pruned weights as zero.
        regrow: Whether pruned weights get the gradient too, so that they may come back.
    """

    def __init__(self, masked: bool = True, regrow: bool = False) -> None:
        self.masked, self.regrow = masked, regrow


class MaskMap(HeldMask):
    """Sets pruned weights to zero; a weight without a mask is dense.

    Args:
        rule: What is in force at the moment; a map on its own (baking from a file) masks.
    """

    kind = "mask"
    lane = Lane.MASK

    def __init__(self, rule: PruneRule | None = None) -> None:
        super().__init__()
        self.rule = rule or PruneRule()

    def forward(self, weight: Tensor) -> Tensor:
        if not self.rule.masked or not self.holds(weight):
            return weight
        return hard_mask(weight, self.held, self.factor(weight), regrow=self.rule.regrow)

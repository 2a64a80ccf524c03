"""N:M as a pattern of pruning: each group of M inputs keeps its N largest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_peft.weights.groups import Grouping, parse_grouping
from lightning_peft.weights.nm import nm_mask
from lightning_peft.weights.nm_pattern import parse_pattern


@dataclass(frozen=True)
class NMGrouping(Grouping):
    """N of M consecutive inputs stay, whatever the rest of the layer is worth.

    Attributes:
        n: Inputs that stay.
        m: Inputs of a group.
    """

    n: int = 2
    m: int = 4

    @property
    def pruned(self) -> float:
        """Share of the weights that goes."""
        return 1.0 - self.n / self.m

    def mask(self, values: Tensor, dim: int) -> Tensor:
        """Return which weights stay, from one number a weight."""
        return nm_mask(values.contiguous(), self.n, self.m, dim)


def read_pattern(pattern: str) -> Grouping:
    """Read ``"N:M"``, or a pattern of :func:`~lightning_peft.weights.groups.parse_grouping`.

    Raises:
        MisconfigurationException: It is neither.

    Example:
        >>> read_pattern("1:4").pruned
        0.75
    """
    if ":" in pattern and pattern[0].isdigit():
        n, m = parse_pattern(pattern)
        return NMGrouping(n=n, m=m)
    return parse_grouping(pattern)

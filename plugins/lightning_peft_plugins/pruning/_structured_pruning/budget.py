"""How many units of each group go, so that the network costs no more than it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.structure.coupled.units import Coupled

StructuredScope = Literal["global", "layer"]


@dataclass(frozen=True)
class Limits:
    """The units that every group keeps.

    Attributes:
        min_kept: Share of the units a group had at first that always stays, at least one unit.
        round_to: The number of channels that stay is a multiple of this, where there are so many; heads are not rounded.
    """

    min_kept: float
    round_to: int

    def allowed(self, group: Coupled, wanted: int, first: int) -> int:
        """Return how many of the units that are wanted may go.

        Args:
            group: The group.
            wanted: Units to remove.
            first: Units it had at first.

        Example:
            >>> group = Coupled("conv", "channels", 32, [], [])
            >>> [Limits(0.1, 8).allowed(group, wanted, first=32) for wanted in (3, 9, 31)]
            [0, 8, 24]
        """
        kept = max(group.units - wanted, math.ceil(self.min_kept * first - 1e-9), 1)
        multiple = self.round_to if group.kind == "channels" else 1
        return max(0, group.units - math.ceil(kept / multiple) * multiple)


def selections(
    groups: Sequence[Coupled],
    scores: Sequence[Tensor],
    units: Mapping[str, int],
    limits: Limits,
    scope: StructuredScope = "global",
) -> tuple[int, Callable[[int], list[Tensor]]]:
    """Order the ways to cut from nothing to all that may go.

    Args:
        groups: The groups.
        scores: One vector a group (:func:`~lightning_peft_plugins.pruning._structured_pruning.coupled.scores`).
        units: Units that each group had at first, by name, where that is more than now.
        limits: What stays.
        scope: ``"global"`` ranks the units of all groups together; ``"layer"`` takes one share of each group's first units.

    Returns:
        The number of the last way, and a function from its number to the units that go from each group, ascending.
    """
    first = [units.get(group.name, group.units) for group in groups]
    order = [vector.argsort(stable=True) for vector in scores]
    total = sum(group.units for group in groups)
    home = torch.cat([torch.full((group.units,), place) for place, group in enumerate(groups)])
    ranking = home[torch.cat(list(scores)).argsort(stable=True)]

    def choose(number: int) -> list[Tensor]:
        if scope == "global":
            wanted = torch.bincount(ranking[:number], minlength=len(groups)).tolist()
        else:
            wanted = [g.units - n + int(n * number / total + 1e-9) for g, n in zip(groups, first, strict=True)]
        counts = [limits.allowed(g, w, n) for g, w, n in zip(groups, wanted, first, strict=True)]
        return [places[:n].sort().values for places, n in zip(order, counts, strict=True)]

    return total, choose


def search(last: int, cost: Callable[[int], float], budget: float) -> int:
    """Find the smallest cut that costs no more than the budget, else the largest.

    Args:
        last: Number of the largest cut.
        cost: Cost of a cut by number, falling.
        budget: What it may cost.

    Example:
        >>> search(10, lambda number: 100 - number**2, 70), search(10, lambda number: 100, 70)
        (6, 10)
    """
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= budget else (middle + 1, high)
    return low

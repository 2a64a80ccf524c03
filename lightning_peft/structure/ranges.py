"""Coordinates that stay, written as the half-open ranges they form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

Ranges: TypeAlias = Sequence[Sequence[int]]
"""``[[0, 3], [5, 6]]`` for the coordinates 0, 1, 2 and 5."""


def ranges(coordinates: Iterable[int]) -> list[list[int]]:
    """Write coordinates as ranges.

    Args:
        coordinates: Ascending, each once.

    Example:
        >>> ranges([0, 1, 2, 5])
        [[0, 3], [5, 6]]
    """
    found: list[list[int]] = []
    for coordinate in coordinates:
        if found and found[-1][1] == coordinate:
            found[-1][1] += 1
        else:
            found.append([coordinate, coordinate + 1])
    return found


def indices(kept: Ranges) -> Tensor:
    """Coordinates of ranges, ascending.

    Example:
        >>> indices([[0, 3], [5, 6]])
        tensor([0, 1, 2, 5])
    """
    starts, stops = torch.tensor(kept).unbind(1)
    sizes = stops - starts
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) + (starts - before).repeat_interleave(sizes)


def complement(kept: Ranges, size: int) -> Tensor:
    """The other coordinates, ascending.

    Example:
        >>> complement([[0, 3], [5, 6]], 7)
        tensor([3, 4, 6])
    """
    rest = torch.ones(size, dtype=torch.bool)
    rest[indices(kept)] = False
    return rest.nonzero().flatten()


def are_ranges(kept: object, size: int) -> bool:
    """Whether a value from a file is ranges of a dimension of that size: ascending, apart, and not empty.

    Example:
        >>> are_ranges([[0, 3], [5, 6]], 6), are_ranges([[5, 6], [0, 3]], 6), are_ranges([[0, 7]], 6)
        (True, False, False)
    """
    if not isinstance(kept, list) or not kept:
        return False
    if not all(isinstance(part, list) and len(part) == 2 and all(type(value) is int for value in part) for part in kept):
        return False
    ordered = all(start < stop for start, stop in kept) and all(a[1] < b[0] for a, b in pairwise(kept))
    return ordered and kept[0][0] >= 0 and kept[-1][1] <= size

"""Following Torch-Pruning's dependency graph from the outputs of a layer to all that must leave with them.

The traversal is ours: Torch-Pruning's own goes round without end where indices shift (rotary embeddings), and forgets which
channels it met twice. Here every coordinate is visited once, and channels that meet in one coordinate become one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Index(NamedTuple):
    """A coordinate and the output of the root layer that led to it; Torch-Pruning's index mappings take and make such."""

    idx: int
    root_idx: int | None


@dataclass
class Reached:
    """The cut at one node of the graph.

    Attributes:
        node: The node.
        handler: Torch-Pruning's function that would cut it.
        roots: Output of the root layer by coordinate.
    """

    node: Any
    handler: Any
    roots: dict[int, int] = field(default_factory=dict)


class Closure:
    """All that depends on the outputs of one layer.

    Args:
        root: Node of the layer.
        handler: Function that cuts its outputs.
        outputs: Their number.
        largest: Largest dimension in the network; a coordinate beyond it exists nowhere.

    Raises:
        OverflowError: Indices shift without end.
    """

    def __init__(self, root: Any, handler: Any, outputs: int, largest: int) -> None:
        self._parents, self._largest = list(range(outputs)), largest
        self._reached: dict[tuple[int, Any], Reached] = {}
        self._left = 1_000_000  # coordinates; a layer of 16k channels may be met in 60 places
        start = [Index(channel, channel) for channel in range(outputs)]
        stack = [(root, handler, self._new(root, handler, start))]
        while stack:
            node, handler, indices = stack.pop()
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(handler):
                    continue
                mapped = _mapped(indices, dependency.index_mapping)
                if not mapped:
                    continue  # another part of a concatenation
                fresh = self._new(dependency.target, dependency.handler, mapped)
                fresh += self._new(dependency.target, dependency.handler, _beside(fresh, dependency.target))
                if fresh:
                    stack.append((dependency.target, dependency.handler, fresh))
        found = [self._find(channel) for channel in range(outputs)]
        numbers = {first: number for number, first in enumerate(sorted(set(found)))}
        self.units = torch.tensor([numbers[first] for first in found])

    def _new(self, node: Any, handler: Any, indices: list[Any]) -> list[Index]:
        """Note coordinates, and return those not met before."""
        place = self._reached.setdefault((id(node), handler), Reached(node, handler))
        fresh = []
        for index in indices:
            if index.root_idx is None or not 0 <= index.idx < self._largest:
                raise OverflowError
            if index.idx in place.roots:
                self._join(place.roots[index.idx], index.root_idx)
            else:
                place.roots[index.idx] = index.root_idx
                fresh.append(Index(index.idx, index.root_idx))
        self._left -= len(fresh)
        if self._left < 0:
            raise OverflowError
        return fresh

    def _find(self, channel: int) -> int:
        while self._parents[channel] != channel:
            channel = self._parents[channel]
        return channel

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._find(one), self._find(other)))
        self._parents[second] = first

    def __iter__(self) -> Iterator[Reached]:
        return iter(self._reached.values())

    def units_of(self, place: Reached, size: int) -> Tensor:
        """Unit of every coordinate of a dimension, -1 for those that do not depend on the root.

        Raises:
            OverflowError: There are no such coordinates.
        """
        if max(place.roots) >= size:
            raise OverflowError
        units = torch.full((size,), -1)
        units[torch.tensor(list(place.roots))] = self.units[torch.tensor(list(place.roots.values()))]
        return units


def _beside(indices: list[Index], node: Any) -> list[Index]:
    """What lies at the same place in the other pieces of a split into equal ones, which must stay equal: one unit."""
    if getattr(node, "pieces", None) is None:
        return []
    size, total = node.pieces
    if any(index.idx >= total for index in indices):
        raise OverflowError
    return [Index(other, index.root_idx) for index in indices for other in range(index.idx % size, total, size)]


def _mapped(indices: list[Any], mappings: Sequence[Any]) -> list[Any]:
    try:
        for mapping in mappings:
            indices = indices if mapping is None else mapping(indices)
    except (ArithmeticError, LookupError, TypeError) as error:  # it holds sizes that Torch-Pruning could not work out
        raise OverflowError from error
    return indices

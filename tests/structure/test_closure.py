"""A graph whose indices shift without end is given up where the network ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_peft.structure.coupled.closure import Closure, Index


def ring(shift: int) -> tuple[Any, list[int]]:
    """A node that depends on itself, ``shift`` channels further, and the coordinates that were asked for."""
    asked: list[int] = []

    def moved(indices: list[Index]) -> list[Index]:
        asked.extend(index.idx for index in indices)
        return [Index(index.idx + shift, index.root_idx) for index in indices]

    node = SimpleNamespace(dependencies=[])
    again = SimpleNamespace(is_triggered_by=lambda handler: True, index_mapping=[moved], target=node, handler="cut")
    node.dependencies = [again]
    return node, asked


def test_indices_beyond_the_largest_dimension_end_the_search() -> None:
    node, asked = ring(1)
    with pytest.raises(OverflowError):
        Closure(node, "cut", outputs=2, largest=16)
    assert max(asked) == 15


def test_channels_that_meet_are_one_unit() -> None:
    node, _ = ring(0)
    assert Closure(node, "cut", outputs=3, largest=3).units.tolist() == [0, 1, 2]
    node.dependencies[0].index_mapping = [lambda indices: [Index(index.idx % 2, index.root_idx) for index in indices]]
    assert Closure(node, "cut", outputs=4, largest=4).units.tolist() == [0, 1, 0, 1]

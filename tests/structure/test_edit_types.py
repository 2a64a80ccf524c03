"""The documented keys of edits are those that builders write."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from torch import nn

from lightning_peft.structure import edit_types
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.low_rank_pair import LowRankPair
from lightning_peft.structure.plain import not_plain
from lightning_peft.structure.put import put_edit
from lightning_peft.structure.slices import slice_entry
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import Layer, WidthMap


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


def resize() -> Any:
    layers = {"0": Layer(output="hidden"), "2": Layer(input="hidden")}
    return width_edit(network(), "", WidthMap({"hidden": 4}, layers), {"hidden": 6})


BUILT: list[tuple[type, Any]] = [
    (edit_types.BlocksEdit, blocks_edit(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), "0", [0], shared=True)),
    (edit_types.ResizeEdit, resize()),
    (edit_types.ResizeEntry, next(iter(resize()["tensors"].values()))),
    (edit_types.SliceEntry, slice_entry([4, 3], {0: [[0, 1], [3, 4]]}, ["other"])),
    (edit_types.PutEdit, put_edit(network(), "0", LowRankPair(1))),
]


@pytest.mark.parametrize(("kind", "built"), BUILT, ids=lambda value: getattr(value, "__name__", ""))
def test_builders_write_the_documented_keys(kind: Any, built: dict[str, Any]) -> None:
    assert kind.__required_keys__ <= set(built) <= set(get_type_hints(kind))
    assert type(built) is dict
    assert not_plain(built) is None
    listed = kind.__doc__.partition("Attributes:")[2]
    inherited = set(edit_types.EditNotes.__annotations__)
    assert all(f" {key}: " in listed for key in set(get_type_hints(kind)) - inherited)

"""A journal from elsewhere writes nothing but what goes with the tensors it resizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.structure import edits, journal
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import Layer, WidthMap

GROWN = WidthMap({"h": 6}, {"0": Layer(output="h"), "2": Layer(input="h")})


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.learning_rate, self.batch_size, self.patience = 1e-3, 4, 6
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
        self.other = nn.Dropout(0.5)
        self.other.size = 6  # type: ignore[assignment]


def resize() -> dict[str, Any]:
    module = Module()
    return copy.deepcopy(dict(width_edit(module.net, "net", GROWN, {"h": 12})))


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("", {"learning_rate": [1e-3, 1e6]}),
        ("", {"batch_size": [4, 8]}),  # by the factor of the axis
        ("", {"patience": [6, 12]}),  # by its sizes
        ("other", {"p": [0.5, 0.25]}),
        ("other", {"size": [6, 12]}),
        ("net.1", {"threshold": [0, 0]}),
        ("net.0", {"out_features": [6, 18]}),
        ("net.0", {"in_features": [8, 1000]}),
    ],
)
def test_a_width_edit_writes_sizes_of_what_it_resizes_only(path: str, changes: dict[str, Any]) -> None:
    module, edit = Module(), resize()
    edits.check(module, edit)
    edit["attributes"].setdefault(path, {}).update(changes)
    with pytest.raises(CheckpointError):
        edits.apply(module, edit)  # type: ignore[arg-type]
    assert (module.learning_rate, module.batch_size, module.patience) == (1e-3, 4, 6)
    assert module.net[0].weight.shape == (6, 8)


def test_a_cut_writes_sizes_of_what_it_cuts_only() -> None:
    module = Module()
    edit: dict[str, Any] = {
        "op": "slice",
        "path": "net",
        "tensors": {"net.0.bias": {"from": [6], "to": [4], "kept": [[[0, 4]]]}},
        "attributes": {"": {"batch_size": [4, 2]}},
    }
    with pytest.raises(CheckpointError, match="batch_size from 4 to 2"):
        edits.check(module, edit)


def test_a_module_built_as_it_ends_gets_no_other_number_either() -> None:
    module, edit = Module(), resize()
    edit["attributes"][""] = {"learning_rate": [1e-3, 1e6]}
    module.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1))
    journal.replay(module, [edit], module.state_dict())  # type: ignore[list-item]
    assert module.learning_rate == 1e-3


def test_one_block_cannot_stand_where_the_file_has_two() -> None:
    module = Module()
    edit = blocks_edit(module, "blocks", [0, 0, 1, 1], shared=True)
    journal.edit(module, edit)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    journal.replay(Module(), [edit], state)
    state["blocks.1.weight"] += torch.ones(())
    with pytest.raises(CheckpointError, match="positions 0 and 1 of blocks hold one block"):
        journal.replay(Module(), [edit], state)

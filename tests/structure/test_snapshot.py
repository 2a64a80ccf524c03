"""A refused checkpoint is undone whatever it had done: every kind of thing it can change is changed here, and given back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.structure import journal
from lightning_peft.structure.edits import Change
from lightning_peft.structure.snapshot import ModuleSnapshot
from lightning_peft.testing.modules import mlp
from lightning_peft.testing.toys import ScaleMap, ThresholdMap
from lightning_peft.testing.trace import difference
from lightning_peft.weights.detach import detach_maps
from lightning_peft.weights.maps import attach_map


class Network(nn.Module):
    """Notes numbers and a configuration, as networks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(depth=2, name="small")
        self.net, self.norm = mlp(), nn.BatchNorm1d(3)
        self.depth, self.table = 2, torch.arange(3.0)
        attach_map(self, "net.0.weight", ScaleMap(0.7))
        scale, mask = attach_map(self, "net.0.weight", ThresholdMap(0.0)).maps
        mask.note, mask.mask = 1, torch.ones(2)
        self.maps = lambda: (scale, mask)


CHANGES: dict[str, Any] = {
    "a setting": lambda m: setattr(m.config, "depth", 3),
    "a new setting": lambda m: setattr(m.config, "width", 3),
    "a number": lambda m: setattr(m, "depth", 3),
    "a new number": lambda m: setattr(m.net[2], "width", 3),
    "a tensor that is noted": lambda m: m.table.zero_(),
    "a parameter": lambda m: m.net[2].weight.data.zero_(),
    "a buffer": lambda m: m.norm.running_mean.fill_(5.0),
    "the size of a parameter": lambda m: setattr(m.net[2].weight, "data", torch.zeros(2, 2)),
    "another parameter in its place": lambda m: setattr(m.net[2], "bias", nn.Parameter(torch.zeros(16))),
    "a part that is taken out": lambda m: m.net.pop(4),
    "a part that is put in": lambda m: m.net.append(nn.Linear(3, 3)),
    "the stored value of a map": lambda m: m.net[0]._parameters["weight"].data.zero_(),
    "the parameter of a map": lambda m: m.maps()[0].scale.data.zero_(),
    "the tensor of a map": lambda m: m.maps()[1].mask.zero_(),
    "the number of a map": lambda m: setattr(m.maps()[1], "note", 2),
    "the journal": lambda m: journal.set_changes(m, [Change({"op": "blocks"})]),
}


def seen(module: Network) -> dict[str, Any]:
    """All there is to see of a module, tensors by value."""
    parts = {name: [*vars(part)] for name, part in module.named_modules()}
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    _, mask = module.maps()
    noted = [vars(module.config), module.depth, module.table, mask.note, mask.mask, journal.journal_of(module)]
    return copy.deepcopy({"parts": parts, "tensors": tensors, "noted": noted, "output": module.net(torch.ones(1, 16)).detach()})


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_given_back(change: str) -> None:
    module = Network()
    before, same = seen(module), dict(module.named_parameters())
    snapshot = ModuleSnapshot(module)
    CHANGES[change](module)
    snapshot.restore()
    assert difference(before, seen(module)) is None
    assert all(tensor is same[name] for name, tensor in module.named_parameters()), "optimizers hold them"


def test_a_value_that_came_before_the_maps_can_still_come_back() -> None:
    module = Network()
    before = mlp_weight()
    snapshot = ModuleSnapshot(module)
    with torch.no_grad():
        module.net[0]._parameters["weight"].zero_()
    snapshot.restore()
    assert not torch.equal(before / 0.7 * 0.7, before)
    detach_maps(module, "pristine")
    assert torch.equal(module.net[0].weight, before)


def mlp_weight() -> Tensor:
    torch.manual_seed(0)
    weight: Tensor = mlp()[0].weight
    return weight


def test_a_part_that_an_edit_had_taken_out_is_given_back_as_it_was() -> None:
    module, block = Network(), nn.Linear(3, 3)
    change, before = Change({"op": "blocks"}, removed={"net.5": block}), block.weight.detach().clone()
    journal.set_changes(module, [change])
    snapshot = ModuleSnapshot(module)
    journal.set_changes(module, [])
    module.net.append(block)
    nn.init.zeros_(block.weight)
    snapshot.restore()
    assert len(module.net) == 5
    assert journal.changes_of(module)[0].removed["net.5"] is block
    assert torch.equal(block.weight, before)


def test_what_inference_mode_made_is_given_back_outside_of_it() -> None:
    """A metric that was reset in an evaluation holds such tensors, and a run that is turned down gives the module back."""
    module = Network()
    with torch.inference_mode():
        module.register_buffer("count", torch.tensor(3.0))
        snapshot = ModuleSnapshot(module)
        module.count.add_(1)
    snapshot.restore()
    assert float(module.count) == 3

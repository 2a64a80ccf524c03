"""Slices: what stays, what comes back, what the optimizer keeps, and which records are refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.structure import edits, journal
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.ranges import are_ranges, complement, indices, ranges
from lightning_peft.structure.slices import narrow, slice_entry
from lightning_peft.structure.width_state import carry_optimizer_state
from lightning_peft.weights.held import HeldMask
from lightning_peft.weights.maps import WeightMap, attach_map, mapped_tensors


class Mask(HeldMask):
    kind, lane, owner = "test mask", Lane.MASK, "a test"

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.held if self.holds(weight) else weight


class Delta(WeightMap):
    kind, lane, owner = "test delta", Lane.DELTA, "a test"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(size))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.delta[:, None]


def net(hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 3))


def cut(kept: list[int], hidden: int = 6) -> dict[str, Any]:
    """Keep some of the hidden units of :func:`net`, as a file would say it."""
    part = ranges(kept)
    vectors = ["0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    shapes = {"0.weight": ([hidden, 4], 0), "3.weight": ([3, hidden], 1)} | {name: ([hidden], 0) for name in vectors}
    sizes = {"0": "out_features", "1": "num_features", "3": "in_features"}
    edit = {
        "op": "slice",
        "path": "",
        "tensors": {name: slice_entry(shape, {dim: part}) for name, (shape, dim) in shapes.items()},
        "attributes": {path: {key: [hidden, len(kept)]} for path, key in sizes.items()},
    }
    return json.loads(json.dumps(edit))


subsets = st.sets(st.integers(0, 5), min_size=1, max_size=5).map(sorted)


@given(st.sets(st.integers(0, 30), min_size=1).map(sorted))
def test_ranges_say_what_they_were_made_of(kept: list[int]) -> None:
    found = ranges(kept)
    assert indices(found).tolist() == kept
    assert are_ranges(found, 31)
    assert sorted(complement(found, 31).tolist() + kept) == list(range(31))


@pytest.mark.parametrize(
    "kept",
    [None, [], [[1, 1]], [[2, 1]], [[0, 2], [1, 3]], [[0, 2], [2, 3]], [[-1, 2]], [[0, 9]], [[0]], [[0.0, 1.0]], "0", [0, 1]],
)
def test_damaged_ranges(kept: Any) -> None:
    assert not are_ranges(kept, 6)


@settings(max_examples=25)
@given(subsets)
def test_a_network_loses_units_and_gets_them_back(kept: list[int]) -> None:
    whole, inputs = net(), torch.randn(5, 4)
    parameters = dict(whole.named_parameters())
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    change = edits.apply(whole, cut(kept))
    assert dict(whole.named_parameters()) == parameters  # the same objects
    assert [whole[0].out_features, whole[1].num_features, whole[3].in_features] == [len(kept)] * 3
    assert torch.equal(whole[0].weight, before["0.weight"][kept])
    assert torch.equal(whole[3].weight, before["3.weight"][:, kept])
    masked = net().eval()
    out = [unit for unit in range(6) if unit not in kept]
    with torch.no_grad():
        masked[1].weight[out] = masked[1].bias[out] = 0.0
        torch.testing.assert_close(whole.eval()(inputs), masked(inputs))
        whole[0].weight.add_(1.0)
    edits.undo(whole, change)
    expected = dict(before)
    expected["0.weight"][kept] += 1.0
    assert all(torch.equal(value, expected[name]) for name, value in whole.state_dict().items())
    assert whole.train()(inputs).shape == (5, 3)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=10)
@given(kept=subsets)
def test_optimizers_go_on_with_what_is_left_as_if_nothing_had_happened(optimizer: str, kept: list[int]) -> None:
    """Elementwise optimizers: the same gradients move the coordinates that stay in the same way."""
    whole, sliced = net(), net()
    make, edit = OPTIMIZERS[optimizer], cut(kept)
    pair = [make(whole.parameters()), make(sliced.parameters())]

    def step(gradients: dict[str, torch.Tensor]) -> None:
        for module, optimizer in zip((whole, sliced), pair, strict=True):
            for name, parameter in module.named_parameters():
                grad = gradients[name]
                small = grad.shape != parameter.shape
                parameter.grad = narrow(grad, edit["tensors"][name]["kept"]) if small else grad.clone()
            optimizer.step()

    def drawn() -> dict[str, torch.Tensor]:
        return {name: torch.randn_like(parameter) for name, parameter in whole.named_parameters()}

    step(drawn())
    edits.apply(sliced, edit)
    for name, parameter in sliced.named_parameters():
        if name in edit["tensors"]:
            carry_optimizer_state(pair[1].state[parameter], edit, name, "pad")
    step(drawn())
    left = dict(sliced.named_parameters())
    for name, parameter in whole.named_parameters():
        expected = narrow(parameter, edit["tensors"][name]["kept"]) if name in edit["tensors"] else parameter
        assert torch.equal(left[name], expected), name


def test_factored_moments_are_cut() -> None:
    model = net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    edit = cut([0, 2, 5])
    before = {key: value.clone() for key, value in optimizer.state[model[3].weight].items()}
    edits.apply(model, edit)
    state = optimizer.state[model[3].weight]
    carry_optimizer_state(state, edit, "3.weight", "pad")
    assert torch.equal(state["row_var"], before["row_var"])
    assert torch.equal(state["col_var"], before["col_var"][:, [0, 2, 5]])


def test_tied_tensors_are_cut_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    edit = {
        "op": "slice",
        "path": "",
        "tensors": {"embed.weight": slice_entry([7, 4], {1: [[1, 3]]}, ["head.weight"])},
        "attributes": {"embed": {"embedding_dim": [4, 2]}, "head": {"in_features": [4, 2]}},
    }
    edits.apply(model, edit)
    assert model.head.weight is model.embed.weight
    assert model.head.weight.shape == (7, 2)
    loose = Tied()
    loose.head.weight = nn.Parameter(torch.zeros(7, 4))
    with pytest.raises(CheckpointError, match="Tie tensors as they were"):
        edits.apply(loose, edit)


def test_masks_are_cut_along_and_what_comes_back_is_live() -> None:
    model = net()
    mask = torch.rand(6, 4) > 0.5
    attach_map(model, "0.weight", Mask())
    next(mapped_tensors(model)).maps[0].hold(mask.clone())
    change = edits.apply(model, cut([1, 4]))
    held = next(mapped_tensors(model)).maps[0].held
    assert torch.equal(held, mask[[1, 4]])
    edits.undo(model, change)
    held = next(mapped_tensors(model)).maps[0].held
    assert torch.equal(held[[1, 4]], mask[[1, 4]])
    assert bool(held[[0, 2, 3, 5]].all())


def test_maps_with_tensors_of_the_old_size_are_refused() -> None:
    model = net()
    attach_map(model, "0.weight", Delta(6))
    with pytest.raises(CheckpointError, match=r"'test delta' of a test keeps delta of shape \(6,\).*exclude="):
        edits.apply(model, cut([1, 4]))
    assert model[0].weight.shape == (6, 4)


def test_the_journal_is_replayed_and_taken_back_in_another_process() -> None:
    first = net()
    journal.edit(first, cut([0, 1, 2, 3]))
    journal.edit(first, cut([1, 3], hidden=4))
    state = copy.deepcopy(first.state_dict())
    fresh = net()
    assert journal.replay(fresh, json.loads(json.dumps(journal.journal_of(first))), state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(torch.ones(2, 4)), first.eval()(torch.ones(2, 4)))
    twin = copy.deepcopy(fresh)
    journal.hand_on(fresh, twin)
    assert journal.replay(twin, [], net().state_dict())
    twin.load_state_dict(net().state_dict())
    assert twin(torch.ones(2, 4)).shape == (2, 3)
    narrow_one = net(2)  # a class that was told the final size
    assert not journal.replay(narrow_one, journal.journal_of(first), state)


def tampered(path: list[Any], value: Any) -> dict[str, Any]:
    edit = cut([1, 2])
    place = edit
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return edit


TAMPERS: dict[str, tuple[list[Any], Any, str]] = {
    "tensors": (["tensors"], [], "malformed"),
    "entry": (["tensors", "0.weight"], "rm -rf", "malformed"),
    "order": (["tensors", "0.weight", "kept", 0], [[2, 3], [1, 2]], "malformed"),
    "range": (["tensors", "0.weight", "kept", 0], [[5, 7]], "malformed"),
    "length": (["tensors", "0.weight", "kept"], [[[1, 3]]], "malformed"),
    "sum": (["tensors", "0.weight", "to"], [3, 4], "malformed"),
    "nothing left": (["tensors", "0.weight", "to"], [0, 4], "malformed"),
    "float": (["tensors", "0.weight", "from"], [6.0, 4], "malformed"),
    "huge": (["tensors", "0.weight", "from"], [10**12, 4], "made in 0.weight of shape"),
    "attributes": (["attributes"], None, "malformed"),
    "dunder": (["attributes", "0"], {"__class__": [6, 2]}, "__class__"),
    "private": (["attributes", "0"], {"_version": [1, 2]}, "_version"),
    "layer": (["attributes", "nowhere"], {"out_features": [6, 2]}, "no submodule 'nowhere'"),
    "tied": (["tensors", "0.weight", "tied"], ["3.weight"], "tied to"),
    "unknown": (["tensors", "9.weight"], {"from": [6], "to": [2], "kept": [[[1, 3]]]}, "no such tensor"),
}


@pytest.mark.parametrize("what", TAMPERS)
def test_damaged_records_are_refused_before_anything_is_touched(what: str) -> None:
    path, value, message = TAMPERS[what]
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        journal.edit(model, tampered(path, value))
    assert journal.journal_of(model) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

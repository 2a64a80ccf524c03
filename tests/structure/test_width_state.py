"""Optimizer state across a change of width."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from width_toys import LAYERS, NET, Net, edit_of

from lightning_peft.structure.width import resize
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import WidthMap
from lightning_peft.structure.width_state import carry_optimizer_state, carry_state


def grown(optimizer, net, to, rule):
    net(torch.tensor([1, 2, 3])).square().sum().backward()
    optimizer.step()
    edit = edit_of(net, to)
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in net.named_parameters()}
    resize(net, edit)
    for name, parameter in net.named_parameters():
        if name in edit["tensors"]:
            carry_optimizer_state(optimizer.state[parameter], edit, name, rule)
    net(torch.tensor([1, 2, 3])).square().sum().backward()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.step()
    assert all((p - q).abs().max() > 0 for p, q in zip(net.parameters(), before, strict=True)), "the step moves nothing"
    return edit, old


@pytest.mark.parametrize("rule", ["copy", "pad"])
@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        torch.optim.Adafactor,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.Adagrad,
    ],
)
def test_optimizers_go_on_after_a_change_of_width(make, rule):
    net = Net()
    edit, _ = grown(make(net.parameters()), net, {"width": 10}, rule)
    assert edit["axes"] == {"width": [4, 10], "ffn": [6, 15]}


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_factored_states_that_drop_a_dimension_are_carried(name):
    optimizer = pytest.importorskip("timm.optim" if name == "timm" else "transformers.optimization").Adafactor
    options = {"min_dim_size_to_factor": 1} if name == "timm" else {}
    net = Net(4, 4)
    width_map = WidthMap({"width": 4, "ffn": 4}, LAYERS, NET.tensors, NET.attributes)
    adafactor = optimizer(net.parameters(), **options)
    net(torch.tensor([1, 2])).square().sum().backward()
    adafactor.step()
    state = adafactor.state[net.up.weight]
    rows, columns = state["exp_avg_sq_row"].clone(), state["exp_avg_sq_col"].clone()
    edit = width_edit(net, "", width_map, {"width": 6, "ffn": 7})
    resize(net, edit)
    for key, parameter in net.named_parameters():
        carry_optimizer_state(adafactor.state[parameter], edit, key, "copy")
    assert torch.equal(state["exp_avg_sq_row"], rows[torch.arange(7) % 4])
    assert torch.equal(state["exp_avg_sq_col"], columns[torch.arange(6) % 4])
    net(torch.tensor([1, 2])).square().sum().backward()
    adafactor.step()


def test_old_coordinates_keep_their_state_bit_for_bit():
    net = Net()
    adam = torch.optim.AdamW(net.parameters(), lr=0.0)
    net(torch.tensor([1, 2, 3])).sum().backward()
    adam.step()
    before = adam.state[net.up.weight]["exp_avg"].clone()
    edit = edit_of(net, {"width": 8})
    entry = edit["tensors"]["up.weight"]
    padded = carry_state(before, entry, edit["axes"], "pad")
    assert torch.equal(padded[:6, :4], before)
    assert not bool(padded[6:].any() or padded[:, 4:].any())
    assert torch.equal(carry_state(before, entry, edit["axes"], "copy"), before.repeat(2, 2))
    step = adam.state[net.up.weight]["step"]
    assert carry_state(step, entry, edit["axes"], "pad") is step


def test_a_state_of_an_unknown_shape_is_refused_and_nothing_changed():
    edit = edit_of(Net(), {"width": 8})
    state = {"exp_avg": torch.zeros(6, 4), "blocks": torch.zeros(5)}
    with pytest.raises(MisconfigurationException, match=r"'blocks' of shape \[5\].*reset"):
        carry_optimizer_state(state, edit, "up.weight", "pad")
    assert state["exp_avg"].shape == (6, 4)

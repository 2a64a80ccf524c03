"""LiGO's short training of the growth operator."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.func import functional_call
from torch.nn import functional as F
from width_networks import IMAGES, gpt2, ready, vit

from lightning_peft import LayerGrowth
from lightning_peft.structure import edits
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft.weights.maps import plain_values, set_plain_values
from lightning_peft_plugins.growth._layer_growth.ligo_training import (
    init_operator,
    materialised,
    train_operator,
)
from lightning_peft_plugins.growth._layer_growth.width_families import find_width_map

LABELS = torch.tensor([0, 3, 1])


def growths(net):
    """Edits of width, of depth, and of both, on the network each is made for, with the grown network."""
    wide = copy.deepcopy(net)
    wider = width_edit(wide, "", find_width_map(wide), {"width": 20})
    deeper = blocks_edit(net, "blocks", [0, 1, 0, 1])
    edits.apply(wide, wider)
    then = blocks_edit(wide, "blocks", [0, 0, 1, 1])
    return {"width": [wider], "depth": [deeper], "both": [wider, then]}


def grown(net, chosen):
    net = copy.deepcopy(net)
    for edit in chosen:
        edits.apply(net, edit)
    return net


def loss_on(net):
    def loss_of(values, step):
        return F.cross_entropy(functional_call(net, values, (IMAGES,)), LABELS)

    return loss_of


def learn(values, chosen, loss_of, steps, lr, seed=0):
    """Values grown by an operator that was trained for it."""
    with torch.no_grad():
        operator = train_operator(values, chosen, loss_of, steps, lr, torch.Generator().manual_seed(seed))
        return materialised(values, chosen, operator)


@pytest.mark.parametrize("growth", ["width", "depth", "both"])
def test_the_loss_falls_while_only_the_operator_learns(growth):
    small = ready(vit())
    chosen = growths(small)[growth]
    net, values = grown(small, chosen), plain_values(small)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loss_of = loss_on(net)
    first = materialised(values, chosen, init_operator(values, chosen, torch.Generator().manual_seed(1)))
    learnt = learn(values, chosen, loss_of, 30, 0.02, seed=1)
    assert loss_of(learnt, 0).item() < 0.7 * loss_of(first, 0).item()
    assert all(not value.requires_grad for value in learnt.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    set_plain_values(net, learnt)  # every name and shape is one of the grown network
    torch.testing.assert_close(F.cross_entropy(net(IMAGES), LABELS), loss_of(learnt, 0))
    again = learn(values, chosen, loss_of, 30, 0.02, seed=1)
    assert all(torch.equal(value, learnt[name]) for name, value in again.items())


@pytest.mark.parametrize("growth", ["width", "depth", "both"])
def test_one_hot_coefficients_and_zero_rows_are_the_plain_edit(growth):
    small = ready(vit())
    chosen = growths(small)[growth]
    net, values = grown(small, chosen), plain_values(small)
    operator = init_operator(values, chosen, torch.Generator(), noise=0.0)
    for edit, part in zip(chosen, operator, strict=True):
        if edit["op"] == "resize":
            for extra in part.values():
                extra.zero_()
    found = materialised(values, chosen, operator)
    expected = net.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert all(name in found or torch.equal(value, values[name]) for name, value in expected.items())


def test_the_learnt_operator_grows_averages_too():
    small = ready(vit())
    chosen = growths(small)["both"]
    operator = train_operator(plain_values(small), chosen, loss_on(grown(small, chosen)), 2, 0.02, torch.Generator())
    half = {name: value / 2 for name, value in plain_values(small).items()}
    whole = materialised(plain_values(small), chosen, operator)
    for name, value in materialised(half, chosen, operator).items():
        torch.testing.assert_close(value, whole[name] / 2)  # the operator is linear


def test_ranks_agree_when_their_gradients_are_averaged():
    small = ready(vit())
    chosen = growths(small)["width"]
    net, seen = grown(small, chosen), []

    def reduce(gradient):
        seen.append(gradient.shape)
        return torch.zeros_like(gradient)

    operator = train_operator(plain_values(small), chosen, loss_on(net), 2, 0.1, torch.Generator(), reduce=reduce)
    first = init_operator(plain_values(small), chosen, torch.Generator())
    assert len(seen) == 2 * len(operator[0])
    assert all(torch.equal(value, first[0][name]) for name, value in operator[0].items())


def test_tied_weights_stay_tied():
    small = ready(gpt2())
    chosen = [width_edit(small, "", find_width_map(small), {"width": 16})]
    net = grown(small, chosen)
    ids = torch.tensor([[1, 5, 3, 8, 2, 2]])
    losses = []

    def loss_of(values, step):
        assert "lm_head.weight" not in values
        loss = functional_call(net, values, (ids,), {"labels": ids}).loss
        losses.append(float(loss.detach()))
        return loss

    learnt = learn(plain_values(small), chosen, loss_of, 20, 0.02)
    assert losses[-1] < losses[0]
    set_plain_values(net, learnt)
    assert net.lm_head.weight is net.transformer.wte.weight
    assert net(ids, labels=ids).loss.item() == pytest.approx(loss_of(learnt, 20).item())


def test_counters_in_blocks_are_copied():
    small = torch.nn.Sequential(torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.BatchNorm1d(2)) for _ in range(2))))
    small[0][1][0].num_batches_tracked += 3
    chosen = [blocks_edit(small, "0", [0, 1, 1])]
    found = materialised(plain_values(small), chosen, init_operator(plain_values(small), chosen, torch.Generator()))
    assert int(found["0.2.0.num_batches_tracked"]) == 3
    set_plain_values(grown(small, chosen), found)


@pytest.mark.parametrize(
    ("loss", "says"),
    [(lambda values: torch.tensor(1.0), "does not depend"), (lambda values: values.sum() / 0, "is (inf|-inf|nan) at")],
)
def test_losses_that_teach_nothing_are_refused(loss, says):
    small = ready(vit())
    chosen = growths(small)["width"]
    with pytest.raises(MisconfigurationException, match=says):
        learn(plain_values(small), chosen, lambda values, step: loss(values["head.weight"]), 1, 0.1)


class Bent(torch.nn.Linear):
    """A block with a tensor that others do not have, as the first of T5, or with another shape."""

    def __init__(self, hidden):
        super().__init__(4, 4)
        if hidden:
            self.own = torch.nn.Parameter(torch.ones(hidden))


@pytest.mark.parametrize("hidden", [(3, 0, 0), (3, 2, 2), (0, 2, 2), (3, 3, 0)])
def test_tensors_are_mixed_among_the_blocks_that_have_them_alike(hidden):
    net = torch.nn.Module()
    net.blocks = torch.nn.Sequential(*map(Bent, hidden))
    edit = blocks_edit(net, "blocks", [0, 1, 2, 1, 2], check="off")
    values = plain_values(net)
    new = learn(values, [edit], lambda values, step: sum(value.pow(2).sum() for value in values.values()), 0, 0.1)
    edits.apply(net, edit)
    set_plain_values(net, new)
    own = [getattr(block, "own", torch.ones(0)) for block in net.blocks]
    assert [value.numel() for value in own] == [hidden[place] for place in (0, 1, 2, 1, 2)]
    assert all(torch.allclose(value, torch.ones_like(value)) for value in own)  # mixtures of ones, in shares that sum to 1
    assert not any(torch.equal(net.blocks[3].weight, values[f"blocks.{place}.weight"]) for place in range(3))


def test_blocks_that_have_nothing_alike_are_refused():
    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Embedding(3, 4), torch.nn.PReLU()])
    net.blocks[1]._parameters["other"] = net.blocks[1]._parameters.pop("weight")
    net.blocks[2]._parameters["third"] = net.blocks[2]._parameters.pop("weight")
    edit = blocks_edit(net, "blocks", [0, 1, 2, 1], check="off")
    with pytest.raises(MisconfigurationException, match=r"nothing to mix.*Choose another operator"):
        learn(plain_values(net), [edit], lambda values, step: torch.zeros(()), 1, 0.1)


def test_running_statistics_are_mixed_and_teach_nothing():
    class Normed(Plain):
        def build(self):
            super().build()
            parts = (torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16)) for _ in range(3))
            self.model.insert(0, torch.nn.Sequential(*parts))

    grown = fit([LayerGrowth("ligo", at="step:2", to=5, blocks="model.0", operator_steps=2)], style=Normed).module
    assert len(grown.model[0]) == 5
    assert all(bool((part[1].running_mean != 0).any()) for part in grown.model[0])

from __future__ import annotations

import itertools

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer
from torch import nn

from lightning_peft import Lane, Method, Resource, plan
from lightning_peft.attaching.plan import ConflictError, resolve
from lightning_peft.contract import ordered
from lightning_peft.testing.modules import Plain, Root
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


def named(method_name, lane):
    return type(method_name, (Method,), {"lane": lane})()


def test_any_order_of_the_list_gives_one_plan():
    callbacks = [ToyEntropy(), ToyScale(), ToyThreshold(), Timer()]
    assert len({str(plan(Plain(), order)) for order in itertools.permutations(callbacks)}) == 1


def test_the_printed_table():
    table = str(plan(Plain(), [ToyEntropy(), ToyThreshold(targets="model.0"), ToyScale()]))
    assert table.splitlines() == [
        "lightning_peft plan (network: model, 0.00 M parameters)",
        "  REPARAM  toy_scale      3 tensors, 94% of the parameters  writes weight map",
        "  MASK     toy_threshold  1 tensor, 43% of the parameters   writes mask",
        "  LOSS     toy_entropy                                      reads logits, sample index",
    ]


def test_the_plan_says_what_is_out_of_reach_and_warns_when_a_method_reaches_next_to_nothing():
    network = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(64, 2), nn.LSTM(64, 64), nn.Embedding(9, 64))
    some = "1.in_proj_weight, 2.weight_ih_l0, 2.weight_hh_l0"
    assert f"2 tensors, 8% of the parameters, not {some}" in str(plan(network, [ToyThreshold()]))
    little = nn.Sequential(nn.Linear(8, 8), *network[2:])
    with pytest.warns(UserWarning, match=r"acts on 0\.2% of the parameters.*1 tensor, and out of reach are 1\.weight_ih_l0"):
        plan(little, [ToyThreshold()])
    plan(network, [ToyThreshold(exclude="out_proj")])
    plan(little, [ToyThreshold(targets="0")])


def test_what_has_no_weight_is_no_target():
    network = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "attention": nn.MultiheadAttention(8, 2)})
    assert ToyThreshold(targets="re:^body").claims(network) == ["body.0.weight"]
    with pytest.raises(MisconfigurationException, match=r"body, Sequential, has no weight of its own.*targets=\['body.0'\]"):
        plan(network, [ToyThreshold(targets="body")])
    refusal = r"attention, MultiheadAttention, has no weight but in_proj_weight.*name its layers: \['attention.out_proj'\]"
    with pytest.raises(MisconfigurationException, match=refusal):
        plan(network, [ToyThreshold(targets=nn.MultiheadAttention)])
    plan(network, [ToyThreshold(targets=["body.0", "attention.out_proj"])])


def test_the_module_itself_can_be_the_network():
    assert "network: the module itself" in str(plan(Root(), [ToyEntropy()]))
    assert "network: model" in str(plan(Plain(), [ToyScale(), ToyEntropy(network="model")]))


def test_an_ambiguous_network_is_an_error_only_for_those_who_read_it():
    two = type("Two", (LightningModule,), {})()
    two.a, two.b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert "network: the module itself" in str(plan(two, [ToyScale()]))
    with pytest.raises(MisconfigurationException, match="no single network"):
        plan(two, [ToyScale(), ToyEntropy()])
    assert "network: b" in str(plan(two, [ToyScale(), ToyEntropy(network="b")]))


def test_lanes_come_before_names():
    methods = [named("A", Lane.REPORT), named("B", Lane.LOSS), named("Z", Lane.STRUCTURE), named("A2", Lane.LOSS)]
    assert [method.name for method in ordered(methods)] == ["z", "a2", "b", "a"]


def test_nothing_is_touched():
    module = Plain()
    before = dict(vars(module))
    plan(module, [ToyEntropy(), ToyScale(), ToyThreshold()])
    assert dict(vars(module)) == before
    assert "parametrizations" not in str(list(module.state_dict()))


def test_two_masks_on_one_tensor():
    with pytest.raises(ConflictError, match=r"a and b both put a mask on model\.0\.weight.*exclude=\['model\.0'\]"):
        plan(Plain(), [ToyThreshold(name="a"), ToyThreshold(name="b", targets="model.0")])
    plan(Plain(), [ToyThreshold(name="a", exclude="model.0"), ToyThreshold(name="b", targets="model.0")])
    plan(Plain(), [ToyScale(), ToyThreshold()])  # a map and a mask on one tensor are what lanes are for


def test_two_reparametrisations_of_one_tensor():
    with pytest.raises(ConflictError, match=r"both put a weight map on model\.0\.weight"):
        plan(Plain(), [ToyScale(name="a"), ToyScale(name="b")])


def test_two_writers_of_the_loss_scale():
    scaling = type("Scaling", (Method,), {"lane": Lane.LOSS, "writes": frozenset({Resource.LOSS_SCALE})})
    with pytest.raises(ConflictError, match=r"a and b both write the scale of the base loss"):
        plan(Plain(), [scaling(name="b"), scaling(name="a")])


def test_two_methods_of_one_name():
    with pytest.raises(ConflictError, match=r"Two methods are called 'toy_entropy'.*name=\"\.\.\.\""):
        plan(Plain(), [ToyEntropy(), ToyEntropy()])


def test_targets_that_match_nothing_list_the_nearest():
    with pytest.raises(MisconfigurationException, match=r"'model\.00' matches no module of Plain"):
        plan(Plain(), [ToyScale(targets="model.00")])


class Tied(Plain):
    def build(self):
        super().build()
        self.model[2].weight = self.model[0].weight


@pytest.mark.parametrize("targets", ["all-linear", "model.0"])
def test_tied_tensors_are_refused_unless_left_out(targets):
    with pytest.raises(MisconfigurationException, match=r"model\.0\.weight, which is the same parameter as model\.2\.weight"):
        plan(Tied(), [ToyScale(targets=targets)])
    plan(Tied(), [ToyScale(exclude=["model.0", "model.2"])])


def test_any_module_can_be_planned():
    assert "2 tensors" in str(plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [ToyScale()]))


def test_an_empty_plan():
    assert resolve([], Plain(), "").rows == ()
    assert str(plan(Plain(), [Timer()])).count("\n") == 0

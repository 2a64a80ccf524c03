from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_peft import Lane, WeightMap, bake
from lightning_peft.structure.checkpoint import mount_state_dict
from lightning_peft.testing.modules import mlp
from lightning_peft.testing.toys import ScaleMap, ThresholdMap
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.detach import detach_maps
from lightning_peft.weights.maps import (
    attach_map,
    forget_pristine,
    mapped_tensors,
    plain_tensors,
    set_plain_values,
    split_name,
)

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    return mlp()


class Shift(WeightMap):
    """A map without ``right_inverse``: attaching it changes what the layer computes."""

    kind, lane = "shift", Lane.DELTA

    def forward(self, weight):
        return weight + 1.0


class Half(WeightMap):
    """Softer in training than for good."""

    kind, lane = "half", Lane.MASK

    def forward(self, weight):
        return weight * 0.5

    def bake(self, weight):
        return weight * 0.0


def test_right_inverse_keeps_what_the_layer_computes(net):
    before, weight = net(X), net[0].weight
    mapped = attach_map(net, "0.weight", ScaleMap(4.0))
    assert torch.allclose(net(X), before, atol=1e-6)
    assert mapped.stored is weight, "the Parameter object must stay: optimizers hold it"
    assert torch.allclose(mapped.stored * 4.0, net[0].weight)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_whole_chain_is_taken_off_without_trace(net, depth):
    before, weights = trace(net), {k: v.clone() for k, v in net.state_dict().items()}
    for name in ("0.weight", "2.weight", "2.bias"):
        for weight_map in [ScaleMap(3.0), Shift(), ThresholdMap(0.1)][:depth]:
            attach_map(net, name, weight_map)
    assert len(list(mapped_tensors(net))) == 3
    detach_maps(net, "pristine")
    assert difference(before, trace(net)) is None
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in net.state_dict().items())
    assert type(net[0]) is nn.Linear


def test_maps_apply_innermost_first(net):
    weight = net[0].weight.detach().clone()
    attach_map(net, "0.weight", Shift())
    mapped = attach_map(net, "0.weight", ThresholdMap(0.9))
    wanted = torch.where((weight + 1).abs() < 0.9, 0.0, weight + 1)
    assert torch.allclose(net[0].weight, wanted)
    assert torch.allclose(mapped.baked(), wanted)
    assert [weight_map.kind for weight_map in mapped.maps] == ["shift", "toy_threshold"]
    assert torch.equal(mapped.entering(mapped.maps[1]), weight + 1)


@pytest.mark.parametrize(("leave", "factor"), [("baked", 0.0), ("live", 0.5), ("pristine", 0.5)])
def test_what_is_left_behind(net, leave, factor):
    weight = net[0].weight.detach().clone()
    attach_map(net, "0.weight", Half())
    with torch.no_grad():
        net[0]._parameters["weight"].mul_(2.0)  # trained: the pristine value means nothing any more
    detach_maps(net, leave)
    assert torch.allclose(net[0].weight, weight * 2.0 * factor)


def test_pristine_undoes_an_attachment_that_was_never_trained(net):
    weight = net[0].weight.detach().clone()
    attach_map(net, "0.weight", ScaleMap(0.7))
    assert not torch.equal(net[0].weight, weight), "w / 0.7 * 0.7 is not w"
    detach_maps(net, "pristine")
    assert torch.equal(net[0].weight, weight), "bit for bit"


def test_what_was_trained_before_another_map_came_is_not_undone(net):
    attach_map(net, "0.weight", ScaleMap(3.0))
    with torch.no_grad():
        net[0]._parameters["weight"].mul_(2.0)
    attach_map(net, "0.weight", ThresholdMap(0.0))
    live = net[0].weight.detach().clone()
    detach_maps(net, "pristine")
    assert torch.equal(net[0].weight, live)


def test_plain_names_are_those_without_maps(net):
    net[2].weight = net[0].weight
    net.append(net[4])
    names = list(net.state_dict())
    for name in ("0.weight", "2.weight", "4.weight"):
        attach_map(net, name, ScaleMap())
    tensors = plain_tensors(net)
    assert sorted(tensors) == sorted(names)
    assert tensors["0.weight"] is tensors["2.weight"] is net[0]._parameters["weight"]
    assert tensors["4.weight"] is tensors["5.weight"]


def test_forget_pristine_frees_the_copies(net):
    mapped = attach_map(net, "0.weight", ScaleMap(3.0))
    assert mapped.chain.pristine is not None
    forget_pristine(net)
    assert mapped.chain.pristine is None


def test_masks_are_no_buffers_but_follow_the_module(net):
    mapped = attach_map(net, "0.weight", ThresholdMap())
    mask = mapped.maps[0]
    mask.mask = torch.ones(16, 16)
    assert not [name for name in net.state_dict() if "mask" in name]
    net.double()
    assert mask.mask.dtype == torch.float64
    net.to("meta")
    assert mask.mask.is_meta


def test_a_deep_copy_is_baked_without_touching_its_original(net):
    for name in ("0.weight", "0.bias", "2.weight"):
        attach_map(net, name, ScaleMap())
    live = net(X)
    twin = bake(copy.deepcopy(net))
    assert type(twin[0]) is nn.Linear
    assert list(twin.state_dict()) == list(mlp().state_dict())
    assert torch.allclose(twin(X), live, atol=1e-6)
    assert torch.equal(net(X), live)
    assert len(list(mapped_tensors(net))) == 3
    detach_maps(net)
    assert torch.allclose(net(X), live, atol=1e-6)


def test_the_last_layers_own_parametrization_is_left_alone(net):
    parametrizations.weight_norm(net[4])
    attach_map(net, "0.weight", ScaleMap())
    assert [mapped.name for mapped in mapped_tensors(net)] == ["0.weight"]
    detach_maps(net)
    assert parametrize.is_parametrized(net[4], "weight")


def test_refusals_name_the_way_out(net):
    parametrizations.weight_norm(net[4])
    with pytest.raises(MisconfigurationException, match=r"4\.weight is already parametrized by _WeightNorm.*exclude=\['4'\]"):
        attach_map(net, "4.weight", ScaleMap())
    net[0].register_buffer("fixed", torch.ones(2))
    with pytest.raises(MisconfigurationException, match=r"0\.fixed is not a parameter of Linear"):
        attach_map(net, "0.fixed", ScaleMap())
    with pytest.raises(AttributeError):
        attach_map(net, "7.weight", ScaleMap())
    assert list(mapped_tensors(net)) == []


def test_a_reparametrisation_of_a_frozen_tensor_is_frozen_and_a_mask_is_not(net):
    net.requires_grad_(False)
    scale = attach_map(net, "0.weight", ScaleMap()).maps[0]
    assert not scale.scale.requires_grad
    delta = type("Learned", (ScaleMap,), {"lane": Lane.DELTA})()
    attach_map(net, "2.weight", delta)
    assert delta.scale.requires_grad


def test_frozen_stays_frozen(net):
    net[0].requires_grad_(False)
    attach_map(net, "0.weight", ScaleMap())
    detach_maps(net)
    assert [parameter.requires_grad for parameter in net.parameters()] == [False, False, True, True, True, True]


def test_the_module_itself_can_be_mapped():
    layer = nn.Linear(2, 2)
    mapped = attach_map(layer, "weight", ScaleMap())
    assert mapped.name == "weight"
    assert split_name("weight") == ("", "weight")
    assert split_name("a.b.weight") == ("a.b", "weight")
    detach_maps(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_records_are_plain_and_name_their_method():
    scale = ScaleMap(3.0)
    scale.owner, scale.method, scale.enabled = "ToyScale", "coarse", False
    expected = {"map": "toy_scale", "method": "ToyScale", "name": "coarse", "enabled": False, "config": {"start": 3.0}}
    assert scale.record() == expected


def test_gradients_reach_the_stored_value_and_the_maps_own_parameters(net):
    mapped = attach_map(net, "0.weight", ScaleMap())
    attach_map(net, "0.weight", ThresholdMap(0.1))
    net(X).square().sum().backward()
    assert mapped.stored.grad.abs().sum() > 0
    assert mapped.maps[0].scale.grad.abs() > 0


class Principal(WeightMap):
    """As PiSSA: what is stored is the residual, a part of the weight is trained."""

    kind, lane = "principal", Lane.DELTA

    def __init__(self, part=0.5):
        super().__init__()
        self.part = nn.Parameter(torch.full((16, 16), part))

    def forward(self, weight):
        return weight + self.part

    def right_inverse(self, weight):
        return weight - self.part


def two_inverses(net):
    attach_map(net, "0.weight", ScaleMap(4.0))
    return attach_map(net, "0.weight", Principal())


def test_a_second_invertible_map_keeps_what_the_layer_computes(net):
    before, weight = net(X), net[0].weight.detach().clone()
    mapped = two_inverses(net)
    assert torch.allclose(net(X), before, atol=1e-6)
    assert torch.allclose(mapped.stored, (weight - 0.5) / 4.0), "the outermost inverse comes first"
    detach_maps(net, "pristine")
    assert torch.equal(net[0].weight, weight), "bit for bit"


def test_plain_values_enter_two_invertible_maps_by_every_route(net):
    mapped = two_inverses(net)
    new = torch.arange(256.0).view(16, 16) / 64
    stored = (new - 0.5) / 4.0

    def seen():
        assert torch.allclose(mapped.stored, stored)
        assert torch.allclose(net[0].weight, new)
        with torch.no_grad():
            mapped.stored.zero_()

    set_plain_values(net, {"0.weight": new})
    seen()
    net.load_state_dict(mlp().state_dict() | {"0.weight": new})
    seen()
    mount_state_dict(state := mlp().state_dict() | {"0.weight": new}, net)
    assert torch.allclose(state["0.parametrizations.weight.original"], stored)
    net.load_state_dict(state)
    seen()


def test_maps_stand_in_the_order_of_lanes_however_they_come(net):
    before = net(X)
    attach_map(net, "0.weight", ThresholdMap(0.0))
    attach_map(net, "0.weight", Principal())
    mapped = attach_map(net, "0.weight", ScaleMap(4.0))
    assert [weight_map.kind for weight_map in mapped.maps] == ["toy_scale", "principal", "toy_threshold"]
    assert torch.allclose(net(X), before, atol=1e-6)


def test_a_map_that_keeps_its_value_does_not_stand_on_one_that_has_no_inverse(net):
    attach_map(net, "0.weight", Shift())
    live = net(X)
    with pytest.raises(MisconfigurationException, match=r"0\.weight is under the weight map 'shift'.*exclude="):
        attach_map(net, "0.weight", Principal())
    assert torch.equal(net(X), live)
    attach_map(net, "0.weight", ThresholdMap(0.0))

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_peft import bake
from lightning_peft.network.plain_class import plain_class
from lightning_peft.testing.modules import Plain, mlp
from lightning_peft.testing.toys import ScaleMap, ThresholdMap
from lightning_peft.weights.detach import detach_maps
from lightning_peft.weights.mapped_layer import MappedLayer, is_mapped
from lightning_peft.weights.maps import attach_map, mapped_tensors
from lightning_peft_plugins.regularizers.weight_compander import CompanderMap

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Pair(nn.Module):
    """A student and the teacher that follows it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = mlp()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


def ordinary(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_parameters_keep_name_place_and_identity(attribute):
    pair = Pair()
    before = {path: ordinary(part) for path, part in pair.named_modules()}
    attach_map(pair, f"student.0.{attribute}", ScaleMap())
    attach_map(pair, f"student.2.{attribute}", ThresholdMap())
    for path, parameters in before.items():
        now = ordinary(pair.get_submodule(path))
        assert [name for name, _ in now[: len(parameters)]] == [name for name, _ in parameters]
        assert all(a is b for (_, a), (_, b) in zip(now, parameters, strict=False))
        assert len(now) == len(parameters) + (not path), "the map's own parameter is at the end of the whole, and nowhere else"
    assert [*pair.parameters()][-1] is next(mapped_tensors(pair)).maps[0].scale


def test_a_teacher_that_follows_by_position_is_right():
    pair = Pair()
    for name in ("student.0.weight", "student.2.weight", "student.4.bias"):
        attach_map(pair, name, ScaleMap(1.0))
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.add_(1.0)
        for slow, fast in zip(pair.teacher.parameters(), pair.student.parameters(), strict=True):
            assert slow.shape == fast.shape
            slow.lerp_(fast, 1.0)
    assert torch.equal(pair.teacher(X), pair.student(X)), "maps that scale by one change nothing"


def test_copies_have_parameters_of_their_own_in_the_same_order():
    net = mlp()
    mapped = attach_map(net, "0.weight", ScaleMap())
    twin = copy.deepcopy(net)
    names = [name for name, _ in net.named_parameters()]
    assert names == [name for name, _ in twin.named_parameters()]
    assert names[-1] == "0.parametrizations.weight.0.scale"
    assert not {id(p) for p in net.parameters()} & {id(p) for p in twin.parameters()}
    detach_maps(net)
    assert "named_modules" not in vars(net)
    assert len(list(twin.parameters())) == 7, "the copy still has its map"
    assert mapped.layer.weight is not twin[0].weight


def test_state_dict_names_tell_stored_values_from_weights():
    net, plain = mlp(), mlp()
    attach_map(net, "0.weight", ScaleMap(2.0))
    state = net.state_dict()
    assert list(state)[:3] == ["0.parametrizations.weight.original", "0.bias", "0.parametrizations.weight.0.scale"]
    twin = mlp()
    attach_map(twin, "0.weight", ScaleMap(3.0))
    twin.load_state_dict(state)
    assert torch.equal(twin(X), net(X))
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*0\.weight.*Unexpected.*0\.parametrizations\.weight\.original"):
        plain.load_state_dict(state)
    both = state | {"0.weight": torch.zeros(16, 16)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight"):
        twin.load_state_dict(both)
    state["0.parametrizations.weight.7.scale"] = torch.ones(())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.7\.scale"):
        twin.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0\.parametrizations\.weight\.0: [^\n]*\s*size mismatch for scale"):
        twin.load_state_dict(net.state_dict() | {"0.parametrizations.weight.0.scale": torch.ones(2)})
    result = twin.load_state_dict({"0.bias": torch.zeros(16)}, strict=False)
    assert "0.parametrizations.weight.0.scale" in result.missing_keys
    assert torch.equal(twin[0].bias, torch.zeros(16))


def test_weights_of_an_ordinary_module_are_what_the_layer_then_computes_with():
    net, plain = mlp(), mlp()
    for name, weight_map in (("0.weight", ScaleMap(2.0)), ("0.weight", ThresholdMap(0.1)), ("2.bias", ScaleMap(4.0))):
        attach_map(net, name, weight_map)
    with torch.no_grad():
        for parameter in (*net.parameters(), *plain.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain[0].weight[plain[0].weight.abs() < 0.1] = 0.0
    assert torch.allclose(net(X), plain(X), atol=1e-6)
    short = plain.state_dict() | {"0.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        net.load_state_dict(short)


def test_a_value_that_a_map_has_no_place_for_is_refused_with_its_name():
    net = mlp()
    attach_map(net, "0.weight", CompanderMap())
    before = net(X)
    with pytest.raises(RuntimeError, match=r"0\.weight is under weight maps, and it holds weights that are NaN or infinite"):
        net.load_state_dict(mlp().state_dict() | {"0.weight": torch.full((16, 16), torch.inf)})
    net.load_state_dict({name: value for name, value in mlp().state_dict().items() if name != "0.weight"}, strict=False)
    assert net(X).shape == before.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated", "ignore:.*torch.jit.trace_method.* is deprecated")
@pytest.mark.parametrize(
    "record", [torch.jit.trace, lambda net, x: torch.export.export(net, (x,)).module()], ids=["jit", "export"]
)
def test_a_module_under_maps_can_be_recorded(record):
    net = mlp().eval()
    attach_map(net, "0.weight", ScaleMap(2.0))
    attach_map(net, "0.weight", ThresholdMap(0.1))
    attach_map(net, "2.weight", CompanderMap())
    live = net(X)
    assert torch.allclose(record(net, X)(X), live, atol=1e-6)
    assert net(X).requires_grad


def test_a_layer_that_is_reset_has_the_weights_of_a_new_one():
    net, plain = mlp(), mlp()
    attach_map(net, "0.weight", ScaleMap(2.0))
    attach_map(net, "0.bias", ScaleMap(3.0))
    for one in (net, plain):
        torch.manual_seed(5)
        one[0].reset_parameters()
    assert torch.allclose(net[0](X), plain[0](X), atol=1e-6)
    assert is_mapped(net[0])


def test_a_layer_without_reset_gains_none():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    layer = Scale()
    attach_map(layer, "weight", ScaleMap())
    assert is_mapped(layer)
    assert not hasattr(layer, "reset_parameters")


@pytest.mark.parametrize("write", [pickle.dumps, "torch"])
def test_a_pickle_is_the_baked_module(write):
    net = mlp()
    attach_map(net, "0.weight", ScaleMap(2.0))
    attach_map(net, "0.weight", ThresholdMap(0.1))
    net[2].bias.requires_grad_(False)
    attach_map(net, "2.bias", ScaleMap(2.0))
    live = net(X)
    if write == "torch":
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = pickle.loads(write(net))
    assert [type(part) for part in loaded.modules()] == [type(part) for part in mlp().modules()]
    assert list(loaded.state_dict()) == list(mlp().state_dict())
    assert torch.equal(loaded(X), bake(copy.deepcopy(net))(X))
    assert torch.equal(net(X), live)
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["2.bias"]
    assert not any("weight_maps" in vars(part) for part in loaded.modules())
    assert isinstance(net[0], MappedLayer)


def test_tied_weights_are_tied_in_a_pickle():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    for name in ("0.weight", "1.weight"):
        attach_map(net, name, ThresholdMap(0.2))
    loaded = pickle.loads(pickle.dumps(net))
    assert loaded[0].weight is loaded[1].weight
    held = net[0].__reduce_ex__(2)  # as a pickler does until it is done
    with torch.no_grad():
        net[0]._parameters["weight"].mul_(2.0)
    again = pickle.loads(pickle.dumps(net))
    assert again[0].weight is again[1].weight
    assert torch.equal(again[0].weight, net[0].weight), "what an earlier pickle baked is not used again"
    del held
    attach_map(net, "1.weight", ThresholdMap(1.0))
    apart = pickle.loads(pickle.dumps(net))
    assert not torch.equal(net[0].weight, net[1].weight)
    assert torch.equal(apart(torch.eye(4)), net(torch.eye(4))), "a tie of two layers whose maps differ is none in the file"


def test_dtype_and_device_reach_stored_values_and_maps():
    module = Plain()
    mapped = attach_map(module, "model.0.weight", ScaleMap())
    stored = mapped.stored
    module.double()
    assert mapped.stored is stored
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module.model[0].weight.dtype == torch.float64
    module.to("meta")
    assert all(p.is_meta for p in module.parameters())
    assert mapped.layer.weight.is_meta


def test_a_stored_value_that_is_replaced_is_the_one_that_is_read():
    net = mlp()
    attach_map(net, "0.weight", ScaleMap(2.0))
    net[0].weight = nn.Parameter(torch.ones(16, 16))
    assert torch.equal(net[0].weight, torch.full((16, 16), 2.0))
    other = {"0.weight": torch.zeros(16, 16)}
    assert torch.equal(torch.func.functional_call(net, other, X), torch.func.functional_call(net, other, -X))


def test_a_frozen_tensor_gives_its_map_no_gradient():
    net = mlp()
    scale = attach_map(net, "0.weight", ScaleMap()).maps[0].scale
    net[0].requires_grad_(False)
    net(X).sum().backward()
    assert scale.grad is None
    net[0].requires_grad_(True)
    net(X).sum().backward()
    assert scale.grad is not None


def test_an_error_in_a_map_is_not_answered_with_the_stored_value():
    class Broken(ThresholdMap):
        def forward(self, weight):
            return weight.no_such_attribute

    net = mlp()
    attach_map(net, "0.weight", Broken())
    with pytest.raises(RuntimeError, match=r"A weight map on 'weight' failed.*no_such_attribute"):
        net(X)


def test_classes_are_shared_and_given_back():
    net = mlp()
    attach_map(net, "0.weight", ScaleMap())
    attach_map(net, "2.weight", ScaleMap())
    assert type(net[0]) is type(net[2])
    assert plain_class(net[0]) is nn.Linear
    assert is_mapped(net[0], "weight")
    assert not is_mapped(net[0], "bias")
    attach_map(net, "0.bias", ScaleMap())
    assert type(net[0]) is not type(net[2])
    detach_maps(net)
    assert type(net[0]) is nn.Linear
    assert "weight_maps" not in vars(net[0])


def test_a_users_own_parametrization_of_another_tensor_stays():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    before = layer(torch.ones(1, 4))
    attach_map(layer, "bias", ScaleMap())
    assert plain_class(layer) is nn.Linear
    assert torch.allclose(layer(torch.ones(1, 4)), before)
    twin = copy.deepcopy(layer)
    detach_maps(layer)
    assert type(layer).__name__ == "ParametrizedLinear"
    assert torch.allclose(twin(torch.ones(1, 4)), before)


def test_a_layers_own_way_of_copying_is_kept():
    class Counted(nn.Linear):
        def __deepcopy__(self, memo):
            twin = nn.Linear(self.in_features, self.out_features)
            twin.copied = True
            return twin

    net = nn.Sequential(Counted(2, 2))
    attach_map(net, "0.weight", ScaleMap())
    assert copy.deepcopy(net)[0].copied

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import Lane, LayerPart, WeightMap, bake
from lightning_peft.testing.modules import mlp
from lightning_peft.testing.toys import LowRankPart, ThresholdMap
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.detach import detach_maps
from lightning_peft.weights.maps import attach_map
from lightning_peft.weights.parts import part_tensors, placed_parts, put_part

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    return mlp()


class Bottleneck(LayerPart):
    """No weight does what it does."""

    kind, lane = "bottleneck", Lane.DELTA

    def __init__(self, size=16, rate=0.0):
        super().__init__()
        self.down, self.up, self.drop = nn.Linear(size, 2), nn.Linear(2, size), nn.Dropout(rate)

    def forward(self, output, inputs):
        return output + self.up(self.drop(self.down(inputs).relu()))


class Times(LayerPart):
    kind, lane, follows = "times", Lane.DELTA, {}

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, output, inputs):
        return output * self.factor


class Plus(Times):
    kind = "plus"

    def forward(self, output, inputs):
        return output + self.factor


class Early(Plus):
    kind, order = "early", -1


class Reparam(Plus):
    kind, lane = "reparam", Lane.REPARAM


class Inputs(LayerPart):
    """Changes what the layer is given."""

    kind, lane = "inputs", Lane.DELTA

    def around(self, call, layer, args, kwargs):
        return call(args[0] * 2.0, **kwargs) + layer.bias


def low_rank(size=16, rank=2, outputs=None):
    part = LowRankPart(size, outputs or size, rank)
    with torch.no_grad():
        part.up.normal_(generator=torch.Generator().manual_seed(2))
    return part


def test_a_part_sees_inputs_and_output_and_leaves_without_trace(net):
    before, described, parameters = net(X), trace(net), dict(net.named_parameters())
    part = put_part(net, "0", low_rank())
    wanted = net[4](torch.relu(net[2](torch.relu(X @ net[0].weight.T + net[0].bias + X @ part.down.T @ part.up.T))))
    assert torch.allclose(net(X), wanted, atol=1e-6)
    assert not torch.allclose(net(X), before, atol=1e-3)
    assert type(net[0]).__name__ == "MappedLinear"
    detach_maps(net, "pristine")
    assert torch.equal(net(X), before)
    assert difference(described, trace(net)) is None
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())


def test_state_dict_names_do_not_change_and_parameters_come_last(net):
    names, keys = [name for name, _ in net.named_parameters()], list(net.state_dict())
    put_part(net, "2", low_rank())
    assert list(net.state_dict()) == keys
    net.load_state_dict(mlp().state_dict())
    now = [name for name, _ in net.named_parameters()]
    assert now == [*names, "2.layer_parts.:toy_low_rank.down", "2.layer_parts.:toy_low_rank.up"]
    assert [name for name, _ in net[2].named_parameters()] == ["weight", "bias"]
    assert list(part_tensors(net)) == now[len(names) :]


def test_parts_stand_in_the_order_of_lanes_then_of_their_order_then_as_they_came(net):
    plain = net[0](X)
    for part in (Times(3.0), Plus(5.0), Early(7.0), Reparam(11.0)):
        put_part(net, "0", part)
    assert [placed.part.kind for placed in placed_parts(net)] == ["reparam", "early", "times", "plus"]
    assert torch.allclose(net[0](X), (plain + 11.0 + 7.0) * 3.0 + 5.0)
    next(placed_parts(net)).part.enabled = False
    assert torch.allclose(net[0](X), (plain + 7.0) * 3.0 + 5.0)


def test_a_part_can_change_what_the_layer_is_given(net):
    wanted = net[0](2.0 * X) + net[0].bias
    put_part(net, "0", Inputs())
    assert torch.equal(net[0](X), wanted)


def test_a_part_that_stands_there_already_stays(net):
    first = put_part(net, "0", low_rank())
    assert put_part(net, "0", low_rank()) is first
    other = low_rank()
    other.method = "another"
    assert put_part(net, "0", other) is other
    assert len(list(placed_parts(net))) == 2


@pytest.mark.parametrize("route", ["bake", "pickle", "torch.save"])
def test_what_is_linear_goes_into_the_weight(net, route):
    part = put_part(net, "0", low_rank())
    off = put_part(net, "2", low_rank())
    off.enabled = False
    weight, live = net[0].weight.detach().clone(), net(X)
    if route == "bake":
        plain = bake(copy.deepcopy(net))
    elif route == "pickle":
        plain = pickle.loads(pickle.dumps(net))
    else:
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        plain = torch.load(file, weights_only=False)
    assert type(plain[0]) is nn.Linear
    assert "part_stack" not in vars(plain[0])
    assert torch.equal(plain[0].weight, weight + part.up @ part.down)
    assert torch.allclose(plain(X), live, atol=1e-6)
    assert torch.equal(net(X), live)
    assert torch.equal(net[0].weight, weight)


def test_a_layer_under_a_map_and_parts_is_baked_with_both(net):
    class Double(WeightMap):
        kind, lane = "double", Lane.REPARAM

        def forward(self, weight):
            return 2.0 * weight

    part = put_part(net, "0", low_rank())
    attach_map(net, "0.weight", Double())
    live, stored = net(X), net[0]._parameters["weight"].detach().clone()
    plain = bake(copy.deepcopy(net))
    assert torch.allclose(plain[0].weight, 2.0 * stored + part.up @ part.down)
    assert torch.allclose(plain(X), live, atol=1e-6)
    assert torch.allclose(pickle.loads(pickle.dumps(net))(X), live, atol=1e-6)
    detach_maps(net, "pristine")
    assert torch.equal(net[0].weight, stored)


def test_what_is_not_linear_is_not_baked_in_silence(net):
    put_part(net, "0", Bottleneck())
    with pytest.raises(MisconfigurationException, match=r"'bottleneck' of  on 0 .*cannot be baked.*enabled = False"):
        bake(net)
    next(placed_parts(net)).part.enabled = False
    live = net(X)
    assert torch.equal(bake(net)(X), live)


def test_a_copy_has_parts_of_its_own(net):
    part = put_part(net, "0", low_rank())
    twin = copy.deepcopy(net)
    live = net(X)
    assert torch.equal(twin(X), live)
    with torch.no_grad():
        part.up.zero_()
    assert torch.equal(twin(X), live)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in twin.parameters()}


def test_a_part_follows_the_module(net):
    part = put_part(net, "0", Bottleneck(rate=0.5))
    part.mask = torch.ones(2)
    net.eval()
    assert not part.drop.training
    net.train()
    assert part.drop.training
    net.double()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert part.mask.dtype == torch.float64
    assert net(X.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert net.float()(X).dtype == torch.bfloat16


def test_functional_call_and_compile_reach_parts(net):
    plain = net(X)
    part = put_part(net, "0", low_rank())
    live = net(X)
    nothing = {"0.layer_parts.:toy_low_rank.up": torch.zeros_like(part.up)}
    assert torch.allclose(torch.func.functional_call(net, nothing, X), plain, atol=1e-6)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(X), live, atol=1e-6)
    part.enabled = False
    assert torch.allclose(compiled(X), plain, atol=1e-6)
    torch._dynamo.reset()


def test_activation_side_is_the_weight_side_for_less():
    layer, x = nn.Linear(64, 64), torch.randn(16, 64)
    part = low_rank(64, 4)

    class Delta(WeightMap):
        kind, lane = "delta", Lane.DELTA

        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(p.detach().clone()) for p in (part.up, part.down))

        def forward(self, weight):
            return weight + self.up @ self.down

    beside, inside = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
    put_part(beside, "0", part)
    attach_map(inside, "0.weight", Delta())
    for net in (beside, inside):
        net[0]._parameters["weight"].requires_grad_(False)
    outputs, flops, kept = [], [], []
    for net in (beside, inside):
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor)
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = net(x)
            kept.append(sum(t.numel() for t in {t.untyped_storage().data_ptr(): t for t in sizes}.values()))
            out.square().sum().backward()
        outputs.append(out)
        flops.append(counter.get_total_flops())
    assert torch.allclose(*outputs, atol=1e-4)
    assert torch.allclose(part.up.grad, inside[0].weight_maps["weight"].maps[0].up.grad, rtol=1e-4, atol=1e-3)
    # One matrix product of 16 rows with the weight, 2 n d d; thin ones forward, and three backward: 2 n d r each.
    assert flops[0] == 2 * 16 * 64 * 64 + 5 * 2 * 16 * 64 * 4
    assert flops[0] < flops[1] / 1.5, f"{flops}"
    assert kept[0] < kept[1], f"{kept}"


def test_layers_whose_weight_is_used_without_a_call_are_refused():
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2)})
    with pytest.raises(MisconfigurationException, match=r"attn\.out_proj is part of an nn\.Multihead.*exclude=\['attn"):
        put_part(attention, "attn.out_proj", low_rank())
    put_part(attention, "attn", Passed())  # the way out that the message names
    x = torch.randn(3, 2, 16)
    assert torch.equal(attention["attn"](x, x, x)[0], torch.zeros(3, 2, 16))


class Passed(LayerPart):
    """Forgets what an attention returns."""

    kind, lane = "passed", Lane.DELTA

    def forward(self, output, query, key, value):
        return torch.zeros_like(output[0]), output[1]


def test_a_replaced_forward_is_refused(net):
    own = net[0].forward
    net[0].forward = lambda x: own(x)
    with pytest.raises(MisconfigurationException, match=r"forward of 0 \(Linear\) was replaced on the object.*exclude=\['0'\]"):
        put_part(net, "0", low_rank())
    del net[0].forward
    put_part(net, "0", low_rank())


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_the_fused_encoder_layer_does_not_pass_parts_by():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    described, x = trace(encoder), torch.randn(2, 5, 16)
    put_part(encoder, "layers.0.linear1", low_rank(16, 2, 32))
    with torch.no_grad():
        seen = encoder(x)
    with torch.enable_grad():
        assert torch.allclose(seen, encoder(x), atol=1e-5)
    baked = pickle.loads(pickle.dumps(encoder))
    assert all(trace(baked)[what] == described[what] for what in ("classes", "hooks", "state"))
    detach_maps(encoder)
    assert difference(trace(encoder), described) is None


def test_what_a_mask_sets_to_zero_is_not_filled_in(net):
    attach_map(net, "0.weight", ThresholdMap())
    put_part(net, "0", Bottleneck())
    with pytest.raises(MisconfigurationException, match=r"0\.weight is under the mask 'toy_threshold'.*exclude=\['0'\]"):
        put_part(net, "0", low_rank())
    put_part(net, "2", low_rank())
    with pytest.raises(MisconfigurationException, match=r"2\.weight is under the mask 'toy_threshold'.*exclude=\['2'\]"):
        attach_map(net, "2.weight", ThresholdMap())


def test_a_part_that_merges_needs_a_weight(net):
    with pytest.raises(MisconfigurationException, match=r"1 \(ReLU\) has no parameter 'weight'.*exclude=\['1'\]"):
        put_part(net, "1", low_rank())
    put_part(net, "1", Times(2.0))


def test_maps_and_parts_leave_a_layer_in_any_order(net):
    put_part(net, "0", Times(2.0))
    attach_map(net, "0.weight", ThresholdMap(0.0))
    detach_maps(net, parts=False)
    assert [placed.part.kind for placed in placed_parts(net)] == ["times"]
    assert "named_modules" in vars(net)
    detach_maps(net)
    assert type(net[0]) is nn.Linear
    assert "named_modules" not in vars(net)


class Affine(Times):
    """Goes into weight and bias."""

    kind, keeps_zeros = "affine", True

    def forward(self, output, inputs):
        return 2 * output + 1

    def merged(self, weight):
        return 2 * weight

    def merged_bias(self, bias):
        return 2 * bias + 1


def test_a_part_goes_into_the_bias_too(net):
    before = copy.deepcopy(net)
    part = put_part(net, "0", Affine(1))
    assert part.into == ("weight", "bias")
    expected = net(X)
    for baked in (bake(copy.deepcopy(net)), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(baked(X), expected)
        torch.testing.assert_close(baked[0].bias, 2 * before[0].bias + 1)
    detach_maps(net, "pristine")
    assert difference(dict(before.state_dict()), dict(net.state_dict())) is None
    bare = nn.Sequential(nn.Linear(16, 3, bias=False))
    put_part(bare, "0", Affine(1))
    torch.testing.assert_close(bake(bare)(X), 2 * nn.functional.linear(X, bare[0].weight / 2))


def test_of_two_parts_one_may_leave_the_bias_alone(net):
    put_part(net, "0", Affine(1))
    put_part(net, "0", LowRankPart(16, 16, 2, 1))
    expected, bias = net(X), net[0].bias.clone()
    torch.testing.assert_close(bake(net)(X), expected)
    torch.testing.assert_close(net[0].bias, 2 * bias + 1)


def test_a_part_that_keeps_zeros_stands_beside_a_mask(net):
    attach_map(net, "0.weight", ThresholdMap(0.1))
    put_part(net, "0", Affine(1))
    zeros = net[0].weight == 0
    baked = bake(net)
    assert torch.equal(baked[0].weight == 0, zeros)
    attach_map(net, "2.weight", ThresholdMap(0.1))
    with pytest.raises(MisconfigurationException, match="would fill in its zeros"):
        put_part(net, "2", LowRankPart(16, 16, 2, 1))

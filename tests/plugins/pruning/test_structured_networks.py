"""Cuts of real architectures: what is left computes what the whole network does without the units; and parity."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from structured_networks import (
    ATTENTION,
    CONCATENATED,
    IMAGES,
    MOVED,
    NETWORKS,
    RECURRENT,
    UNKNOWN_ATTENTION,
    build,
    channels,
    output,
    resnet,
    squares,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.structure import edits
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft_plugins.pruning._structured_pruning.budget import Limits
from lightning_peft_plugins.pruning._structured_pruning.channels import Baseline
from lightning_peft_plugins.pruning._structured_pruning.coupled import cut_edit

torch_pruning = pytest.importorskip("torch_pruning")


def silence(network: nn.Module, group: Coupled, units: Tensor) -> bool:
    """Make units say zero: their writers, and the norms between; ``False`` when a layer norm mixes them with others."""
    parts = dict(network.named_modules())
    owners = [parts[place.tensor.rpartition(".")[0]] for place in group.places]
    if any(isinstance(owner, nn.LayerNorm) or "RMSNorm" in type(owner).__name__ for owner in owners):
        return False
    for place in group.places:
        path, _, attribute = place.tensor.rpartition(".")
        outputs = int(type(parts[path]).__name__ in ("ConvTranspose2d", "Conv1D") and attribute == "weight")
        values_stay = group.kind == "heads" and not any("v_proj" in other.tensor for other in group.places)
        if (place.dim == outputs or values_stay) and not attribute.startswith("running"):
            with torch.no_grad():
                network.get_parameter(place.tensor).movedim(place.dim, 0)[torch.isin(place.units, units)] = 0.0
    return True


@pytest.mark.parametrize("name", [*NETWORKS, *CONCATENATED, *RECURRENT, *MOVED, *ATTENTION, *UNKNOWN_ATTENTION])
def test_what_is_left_computes_what_the_whole_does_without_the_units(name: str) -> None:
    network, inputs = build(name)
    found = channels(network, inputs)
    silent, cuts = copy.deepcopy(network), []
    for place, group in enumerate(found.groups):
        units = torch.randperm(group.units, generator=torch.Generator().manual_seed(place))[: group.units // 2]
        if silence(silent, group, units):
            cuts.append((group, units))
    kinds = {group.kind for group, _ in cuts}
    assert kinds == ({"channels", "heads"} if name in ("vit", "llama", "bert", *ATTENTION) else {"channels"})
    before = output(network, inputs)
    edits.apply(network, cut_edit(network, "", cuts))
    torch.testing.assert_close(output(network, inputs), output(silent, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, output(network, inputs), atol=1e-3)  # the units had said something


@pytest.mark.parametrize("name", [*NETWORKS, "unet", "cspnet", "densenet", "distilbert", "gpt2"])
def test_every_group_can_be_cut_to_one_unit_and_comes_back(name: str) -> None:
    network, inputs = build(name)
    found = channels(network, inputs)
    before = output(network, inputs)
    change = edits.apply(network, cut_edit(network, "", [(group, torch.arange(1, group.units)) for group in found.groups]))
    assert output(network, inputs).shape == before.shape
    assert sum(p.numel() for p in network.parameters()) < 0.2 * sum(
        p.numel() for p in channels(*build(name)).module.parameters()
    )
    edits.undo(network, change)
    assert torch.equal(output(network, inputs), before)


@pytest.mark.parametrize("counted", ["params", "flops", "channels"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_smallest_cut_within_the_budget(counted: str, scope: str) -> None:
    network, inputs = build("vgg")
    found = channels(network, inputs, counted=counted)
    baseline = Baseline(found.cost(), found.units)
    edit, cost = found.choose(squares(network), 0.4, baseline, Limits(0.0, 1), scope)
    assert edit is not None
    assert 0.5 * baseline.cost < cost <= 0.6 * baseline.cost
    edits.apply(network, edit)
    left = channels(network, inputs, counted=counted)
    assert left.cost() == cost
    assert left.choose(squares(network), 0.4, baseline, Limits(0.0, 1), scope) == (None, cost)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_costs_what_pytorch_counts_in_the_network_that_is_left(name: str) -> None:
    network, inputs = build(name)
    for counted in ("flops", "params"):
        found = channels(network, inputs, counted=counted)
        gone = [torch.randperm(group.units)[: group.units // 2].sort().values for group in found.groups]
        left = copy.deepcopy(network)
        edits.apply(left, cut_edit(left, "", list(zip(found.groups, gone, strict=True))))
        with FlopCounterMode(display=False) as counter:
            output(left, inputs[:1])
        expected = {"flops": counter.get_total_flops(), "params": sum(p.numel() for p in left.parameters())}
        assert found.cost(gone) == expected[counted] < found.cost()


def test_limits_hold() -> None:
    network, inputs = build("vgg")
    found = channels(network, inputs)
    with torch.no_grad():
        network[4].weight.zero_()  # nothing of this layer matters, but none may die
        network[5].weight.zero_()
        network[9].weight.zero_()
    baseline = Baseline(found.cost(), found.units)
    edit, _ = found.choose(squares(network), 0.6, baseline, Limits(0.3, 4), "global")
    edits.apply(network, edit)
    assert [network[0].out_channels % 4, network[4].out_channels] == [0, 4]
    assert network[9].out_features in (4, 8, 10)
    found = channels(*build("vgg"))
    with pytest.raises(MisconfigurationException, match=r"90% of the params .* cannot be removed: .* \d+% can\. Lower amount="):
        found.choose(squares(found.module), 0.9, Baseline(found.cost(), found.units), Limits(0.5, 1), "global")


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_parity_with_torch_pruning(scope: str) -> None:
    torch.manual_seed(3)
    network = resnet()
    theirs = copy.deepcopy(network)
    pruner = torch_pruning.pruner.BasePruner(
        theirs,
        IMAGES,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        global_pruning=scope == "global",
        ignored_layers=[theirs.fc],
    )
    pruner.step()
    found = channels(network, IMAGES, counted="channels")
    edit, _ = found.choose(squares(network), 0.5, Baseline(found.cost(), found.units), Limits(0.0, 1), scope)
    assert edit is not None
    edits.apply(network, edit)
    expected = theirs.state_dict()
    assert {name: value.shape for name, value in network.state_dict().items()} == {n: v.shape for n, v in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_grouped_convolutions_and_shared_tensors_stay_whole() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1))
    found = channels(grouped, IMAGES)
    assert [group.name for group in found.groups] == ["3"]
    assert "in 2 groups" in found.whole["0"]
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1))
    tied[2].weight = tied[0].weight
    found = channels(tied, IMAGES)
    assert "tied" in found.whole["0"]
    assert [group.name for group in found.groups] == ["3"]


def test_a_forward_that_looks_at_values_is_refused() -> None:
    class Choosy(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            if inputs.mean() == 1.0:  # what the trace is called with
                raise ValueError("all ones")
            return super().forward(inputs)

    with pytest.raises(MisconfigurationException, match=r"cannot be traced.*ValueError: all ones.*network="):
        channels(Choosy(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(2, 4))


def test_sizes_written_into_a_forward_are_found_out() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(self.first(inputs).mean((2, 3)).view(-1, 4))

    with pytest.raises(MisconfigurationException, match=r"Nothing .* can be cut .*first: the network fails once some of them"):
        channels(Fixed(), IMAGES)


def test_channels_that_meet_are_one_unit() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            gate, value = self.up(inputs).chunk(2, dim=1)
            return self.head(self.down(gate.sigmoid() * value))

    network = Gated()
    found = channels(network, IMAGES)
    group = next(group for group in found.groups if group.name == "up")
    assert group.units == 4
    places = {(place.tensor, place.dim): place.units.tolist() for place in group.places}
    assert places["up.weight", 0] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert places["down.weight", 1] == [0, 1, 2, 3]
    silent = copy.deepcopy(network)
    with torch.no_grad():
        silent.down.weight[:, [1, 2]] = 0.0
    expected = silent(IMAGES)
    edits.apply(network, cut_edit(network, "", [(group, torch.tensor([2, 1]))]))
    torch.testing.assert_close(network(IMAGES), expected)


def test_grouped_queries_leave_with_their_key_and_value() -> None:
    network, inputs = build("llama")
    group = next(group for group in channels(network, inputs).groups if group.kind == "heads")
    assert group.units == 3
    edits.apply(network, cut_edit(network, "", [(group, torch.tensor([1]))]))
    attention = network.model.layers[0].self_attn
    assert [part.out_features for part in (attention.q_proj, attention.k_proj, attention.v_proj)] == [16, 8, 8]
    assert attention.o_proj.in_features == 16


def test_outputs_of_a_transposed_convolution_can_be_excluded() -> None:
    network, inputs = build("unet")
    layers = {name for name, _ in network.named_modules()}
    assert {group.name for group in channels(network, inputs, allowed=layers - {"up"}).groups} == {
        "outer.0",
        "inner.0",
        "after.0",
    }


def test_queries_that_share_one_key_leave_one_by_one() -> None:
    network, inputs = build("one key")
    group = next(group for group in channels(network, inputs).groups if group.kind == "heads")
    assert group.units == 6
    edits.apply(network, cut_edit(network, "", [(group, torch.tensor([1, 4]))]))
    attention = network.model.layers[0].self_attn
    assert [part.out_features for part in (attention.q_proj, attention.k_proj, attention.v_proj)] == [16, 4, 4]
    assert (attention.o_proj.in_features, attention.num_key_value_groups) == (16, 4)


def test_low_rank_pairs_and_position_tables_lose_their_heads() -> None:
    network, inputs = build("adapted vit")
    group = next(group for group in channels(network, inputs).groups if group.kind == "heads")
    edits.apply(network, cut_edit(network, "", [(group, torch.tensor([1]))]))
    attention = network.get_submodule(group.name)
    assert attention.qkv.base_layer.weight.shape == (54, 24)
    assert attention.qkv.lora_B["default"].weight.shape == (54, 2)
    assert attention.proj.lora_A["default"].weight.shape == (2, 18)
    network, inputs = build("swin")
    group = next(group for group in channels(network, inputs).groups if group.kind == "heads")
    edits.apply(network, cut_edit(network, "", [(group, torch.tensor([1]))]))
    assert network.get_submodule(group.name).relative_position_bias_table.shape == (49, 1)


def test_attention_that_cannot_be_cut_stays_and_the_rest_goes() -> None:
    found = channels(*build("one operator"))
    assert [group.name for group in found.groups] == ["up"]
    assert "attention is a MultiheadAttention" in found.whole["down"]
    assert "the 3 heads of 4 of an nn.MultiheadAttention must make up the 12 numbers" in found.whole["attention"]
    with pytest.raises(MisconfigurationException, match=r"Nothing .* in heads\. attention: the 3 heads of 4"):
        channels(*build("one operator"), kinds=("heads",))


def test_heads_whose_layers_share_a_table_leave_all_of_them() -> None:
    transformers = pytest.importorskip("transformers")
    network, inputs = build("t5")
    heads = [group for group in channels(network, inputs).groups if group.kind == "heads"]
    assert [(group.name, group.units) for group in heads] == [("encoder.block.0.layer.0.SelfAttention", 3)]
    edits.apply(network, cut_edit(network, "", [(heads[0], torch.tensor([1]))]))
    small = transformers.T5EncoderModel(transformers.T5Config(**{**network.config.to_dict(), "num_heads": 2}))
    small.load_state_dict(network.state_dict())  # what the class builds with one head less
    assert torch.equal(output(small.eval(), inputs), output(network.eval(), inputs))

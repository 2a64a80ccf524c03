"""Units of channels: what is found in networks of many kinds, and that leaving a channel out is what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.network.channel_units import ChannelUnit, channel_units
from lightning_peft.network.graph import traced_parts


class SharedActivation(nn.Module):
    """As torchvision writes a residual block: one ReLU, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(inputs)))
        return self.relu(inputs + self.bn2(self.conv2(hidden)))


class Functional(nn.Module):
    """Activations and pools as functions and methods, a flattened map, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 5, 3, padding=1)
        self.hidden, self.head = nn.Linear(5 * 4, 7), nn.Linear(7, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(inputs)), inplace=True), 2)
        x = F.hardswish(self.second(x)).flatten(1)
        return self.head(self.hidden(x).relu())


class DataDependent(nn.Module):
    """Cannot be traced as a whole; its block can."""

    def __init__(self) -> None:
        super().__init__()
        self.block = SharedActivation()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.block(inputs) if inputs.sum() > 0 else self.block(-inputs)


def found(network: nn.Module) -> dict[str, ChannelUnit]:
    return {unit.producer: unit for unit in channel_units(network)}


def test_shared_activations_are_no_gates() -> None:
    units = found(SharedActivation())
    assert (units["conv1"].gate, units["conv1"].consumers, units["conv1"].activated) == ("bn1", ("conv2",), True)
    assert (units["conv2"].gate, units["conv2"].consumers, units["conv2"].activated) == ("bn2", (), False)


def test_functions_are_followed() -> None:
    units = found(Functional())
    assert units["first"].consumers == ("second",)
    assert units["second"].consumers == ("hidden",)
    assert units["hidden"].consumers == ("head",)
    value = torch.randn(2, 5, 3, 3)
    (activation,) = units["second"].activations
    torch.testing.assert_close(activation(value), F.hardswish(value))


def test_blocks_of_what_cannot_be_traced() -> None:
    network = DataDependent()
    assert [prefix for prefix, _ in traced_parts(network)] == ["block."]
    assert found(network)["block.conv1"].consumers == ("block.conv2",)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_stochastic_depth_is_the_same_in_every_draw_and_draws_nothing(library: str) -> None:
    pytest.importorskip(library)
    if library == "torchvision":
        from torchvision.ops import StochasticDepth

        drop: nn.Module = StochasticDepth(0.2, "row")
    else:
        from timm.layers import DropPath

        drop = DropPath(0.2)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), drop, nn.Conv2d(4, 5, 1)).train()
    before = torch.get_rng_state()
    for seed in range(8):  # in training, two calls of it agree in about two of three draws
        torch.manual_seed(seed)
        [unit] = channel_units(network)
        assert (unit.chain, unit.activated, unit.activations, unit.consumers) == (("1", "2"), False, (), ("3",))
        assert drop.training
    torch.set_rng_state(before)
    channel_units(network)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_mixes_channels_ends_a_unit() -> None:
    for mixing in (nn.Softmax(1), nn.GroupNorm(2, 4), nn.Sigmoid(), nn.Flatten(0, 1)):
        assert not found(nn.Sequential(nn.Conv2d(3, 4, 1), mixing, nn.Conv2d(4, 2, 1))), type(mixing).__name__


def test_a_layer_used_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(F.relu(self.conv(F.relu(self.conv(inputs)))))

    assert not found(Twice())


@pytest.mark.parametrize(
    ("name", "units", "closed"),
    [
        ("resnet18", 9, 8),
        ("resnet50", 33, 33),
        ("vgg11_bn", 8, 7),
        ("mobilenetv2_100", 18, 18),
        ("mobilenetv1_100", 14, 14),
        ("tf_efficientnet_lite0", 17, 17),
        ("vit_tiny_patch16_224", 12, 12),
        ("convnext_atto", 12, 12),
    ],
)
def test_units_of_timm_networks(name: str, units: int, closed: int) -> None:
    timm: Any = pytest.importorskip("timm")
    network = timm.create_model(name)
    activated = [unit for unit in channel_units(network) if unit.activated]
    assert (len(activated), sum(bool(unit.consumers) for unit in activated)) == (units, closed)


@pytest.mark.parametrize("flatten", [nn.Flatten(), nn.Flatten(1)])
def test_a_flattened_map_is_read_by_the_linear_layer_behind_it(flatten: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), flatten, nn.Linear(16, 2))
    assert [unit.consumers for unit in channel_units(network)] == [("3",)]


def test_a_depthwise_convolution_belongs_to_the_channels_it_filters() -> None:
    timm: Any = pytest.importorskip("timm")
    unit = found(timm.create_model("tf_efficientnet_lite0"))["blocks.1.0.conv_pw"]
    assert [name.split(".")[-1] for name in unit.chain][:3] == ["bn1", "conv_dw", "bn2"]
    assert unit.gate == "blocks.1.0.bn2"
    assert unit.consumers == ("blocks.1.0.conv_pwl",)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "vgg11_bn"])
@torch.no_grad()
def test_a_channel_that_is_cut_at_its_gate_can_be_left_out(name: str) -> None:
    """Zero at the gate equals no weight in any reader, whatever its own rows are."""
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3).eval()
    unit = next(unit for unit in channel_units(network) if unit.activated and len(unit.consumers) == 1)
    inputs, cut = torch.randn(1, 3, 64, 64), [1, 3]
    linear = isinstance(network.get_submodule(unit.producer), nn.Linear)
    mask = torch.ones(unit.channels)
    mask[cut] = 0.0
    mask = mask if linear else mask[:, None, None]
    handle = network.get_submodule(unit.gate).register_forward_hook(lambda layer, args, output: output * mask)
    gated = network(inputs)
    handle.remove()
    reader: Any = network.get_submodule(unit.consumers[0])
    reader.weight[:, cut] = 0.0
    producer: Any = network.get_submodule(unit.producer)
    producer.weight[cut] = 100.0
    torch.testing.assert_close(network(inputs), gated, rtol=1e-4, atol=1e-5)

"""A network that skips, given and treated as networks are: every input, precision, thread, copy, edit and tracer."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import weight_norm

from lightning_peft.network.channel_units import channel_units
from lightning_peft_plugins.pruning._ftwt.skipping.build import build, lay_out
from lightning_peft_plugins.pruning._ftwt.skipping.deploy import deploy
from lightning_peft_plugins.pruning._ftwt.skipping.layers import Computation, SelectiveLayer
from lightning_peft_plugins.pruning._ftwt.skipping.native import is_by_input, kernels
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor, chosen

X = torch.randn(12, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(), nn.Conv2d(48, 16, 1)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def gates(clear: bool = False) -> dict[str, ChannelPredictor]:
    """Predictors of a share of the channels that differs with the input, or, where precision is low, of clearly the same."""
    torch.manual_seed(3)
    found = {}
    for name, (inputs, outputs) in {"0": (3, 32), "2": (32, 48), "4": (48, 16)}.items():
        found[name] = ChannelPredictor(inputs, outputs, "standard" if name == "2" else "softmax")
        nn.init.normal_(found[name].weight, std=0.02 if clear else 2.0)
        nn.init.normal_(found[name].bias)
        if clear:
            with torch.no_grad():
                found[name].bias.sign_()
    return found


def masked(net: nn.Sequential, inputs: Tensor, predictors: dict[str, ChannelPredictor]) -> Tensor:
    """What skipping should give: everything computed, and channels that are not chosen set to zero."""
    for name, layer in net.named_children():
        mask = chosen(predictors[name](inputs.mean((2, 3))))[:, :, None, None] if name in predictors else None
        inputs = layer(inputs)
        inputs = inputs if mask is None else inputs * mask
    return inputs


def skipping(kernel: bool = True, predictors: dict[str, ChannelPredictor] | None = None) -> nn.Module:
    net = plain()
    network = lay_out(build(net, channel_units(net), predictors or gates(), [], False), channels_last=kernel)
    for layer in [layer for layer in network.modules() if isinstance(layer, SelectiveLayer)]:
        layer.settle(list(layer.ways())[-1] if kernel else Computation(True, layer.reads is not None))
    return network.requires_grad_(False)


@pytest.fixture(scope="module", params=[True, False], ids=["kernels", "PyTorch"])
def network(request: Any) -> nn.Module:
    if request.param and kernels() is None:
        pytest.skip("no kernels here")
    return skipping(request.param)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "one": lambda: X[:1],
    "several": lambda: X[:5],
    "none": lambda: X[:0],
    "another size": lambda: torch.randn(1, 3, 5, 17),
    "one place": lambda: torch.randn(1, 3, 1, 1),
    "channels-last": lambda: X[:1].contiguous(memory_format=torch.channels_last),
    "every second column": lambda: X[:1, :, :, ::2],
    "transposed": lambda: X[:1].transpose(2, 3),
    "expanded": lambda: X[:1, :1].expand(1, 3, 9, 8),
    "repeated sample": lambda: X[:1].expand(4, 3, 9, 8),
    "negated when read": lambda: torch._neg_view(X[:1]),
    "a parameter": lambda: nn.Parameter(X[:1].clone()),
    "not a number": lambda: torch.full((1, 3, 4, 4), torch.nan),
    "infinite": lambda: torch.full((1, 3, 4, 4), torch.inf),
}


@pytest.mark.parametrize("name", INPUTS)
def test_any_input_gives_what_masking_gives(network: nn.Module, name: str) -> None:
    inputs = INPUTS[name]()
    with torch.no_grad():
        expected = masked(plain(), inputs, gates())
        found = network(inputs)
    assert found.shape == expected.shape
    if expected.isfinite().all():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Marked(Tensor):
    """A subclass that does nothing of its own."""


@torch.no_grad()
def test_tensors_of_a_subclass(network: nn.Module) -> None:
    found = network(X[:1].as_subclass(Marked))
    torch.testing.assert_close(found.as_subclass(Tensor), masked(plain(), X[:1], gates()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(1, 1, 9, 8), (1, 4, 9, 8), (1, 200_000, 2, 2), (2, 2, 9, 8), (3, 9, 8), (1, 3, 9), (1, 3, 2, 9, 8)]
)
@torch.no_grad()
def test_wrong_shapes_are_refused_as_pytorch_refuses_them(network: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="skips channels expect"):
        network(torch.randn(shape))
    if len(shape) == 3 and shape[0] == 3:
        inputs = torch.randn(shape)
        with pytest.raises(RuntimeError, match=r"inputs\[None\]"):
            network(inputs)
        assert network(inputs[None]).shape == (1, 4)  # the cure


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
@torch.no_grad()
def test_inputs_of_another_type_than_the_weights_are_refused(network: nn.Module, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError):
        network(torch.ones(1, 3, 9, 8).to(dtype))


@torch.no_grad()
def test_layers_called_out_of_their_network_are_refused(network: nn.Module) -> None:
    network(X[:1])
    with pytest.raises(RuntimeError, match="call it as a whole"):
        network.get_submodule("2")(torch.randn(1, 33, 9, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_other_precisions(dtype: torch.dtype) -> None:
    for kernel in (True, False):
        found = skipping(kernel, gates(clear=True)).to(dtype)(X[:2].to(dtype))
        assert found.dtype is dtype
        expected = masked(plain().to(dtype), X[:2].to(dtype), gates(clear=True))
        tolerance = {torch.float64: 1e-6}.get(dtype, 2e-2)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_autocast() -> None:
    for kernel in (True, False):
        network = skipping(kernel, gates(clear=True))
        for inputs in (X[:1], X[:4]):
            with torch.autocast("cpu", torch.bfloat16):
                found, expected = network(inputs), masked(plain(), inputs, gates(clear=True))
            assert found.dtype is expected.dtype is torch.bfloat16
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_device_without_values(network: nn.Module) -> None:
    found = copy.deepcopy(network).to("meta")(X[:2].to("meta"))
    assert found.shape == (2, 4)
    assert found.is_meta


@torch.no_grad()
def test_values_that_are_only_pretended(network: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert network(mode.from_tensor(X[:2])).shape == (2, 4)


@torch.no_grad()
def test_another_default_device() -> None:
    """What a kernel makes for itself lies on the CPU."""
    network, expected = skipping(), masked(plain(), X[:1], gates())
    if kernels() is None:
        pytest.skip("no kernels here")
    with torch.device("meta"):
        found = network[:7](X[:1])  # type: ignore[index]
    assert found.is_cpu
    torch.testing.assert_close(network[7:](found), expected, rtol=1e-4, atol=1e-4)  # type: ignore[index]


def test_gradients_reach_inputs_and_weights() -> None:
    network, net = skipping(), plain()
    layer: Any = network.get_submodule("2.0")
    layer.weight.requires_grad_(True)
    inputs, same = X[:1].clone().requires_grad_(), X[:1].clone().requires_grad_()
    network(inputs).square().sum().backward()
    masked(net, same, gates()).square().sum().backward()
    torch.testing.assert_close(inputs.grad, same.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, net[2].weight.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_modes_of_modules_and_autograd(network: nn.Module) -> None:
    expected = masked(plain(), X[:1], gates())
    other = copy.deepcopy(network).train()
    torch.testing.assert_close(other(X[:1]), expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(network(X[:1].clone()), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_eight_threads(network: nn.Module) -> None:
    expected = [masked(plain(), sample, gates()) for sample in X.split(1)]
    calls, wrong = (300 if "kernel" in str(network.get_submodule("2.0").way) else 40), []

    def call(first: int) -> None:
        try:
            for i in range(first, first + calls):
                torch.testing.assert_close(network(X[i % 12 :][:1]), expected[i % 12], rtol=1e-4, atol=1e-4)
        except BaseException as error:  # an assertion in a thread is lost otherwise
            wrong.append(repr(error))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def double(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.mul_(2.0)


def double_data(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data *= 2.0


def double_state(network: nn.Module) -> None:
    for name, value in network.state_dict().items():
        value.mul_(1.0 if "predictor" in name else 2.0)


def double_by_loading(network: nn.Module, **settings: Any) -> None:
    state = {name: value * (1.0 if "predictor" in name else 2.0) for name, value in network.state_dict().items()}
    network.load_state_dict({name: value.clone() for name, value in state.items()}, **settings)


def double_by_assignment(network: nn.Module) -> None:
    double_by_loading(network, assign=True)


def double_by_optimizer(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = -parameter.clone()
    torch.optim.SGD(network.parameters(), lr=1.0).step()


def double_elsewhere(network: nn.Module) -> None:
    double(network.double())
    network.float()


EDITS = [double, double_data, double_state, double_by_loading, double_by_assignment]
EDITS += [double_by_optimizer, double_elsewhere]


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_edited_weights_are_computed_with(network: nn.Module, edit: Callable[[nn.Module], None]) -> None:
    edited, net = copy.deepcopy(network), plain()
    double(net)
    edit(edited)
    torch.testing.assert_close(edited(X[:1]), masked(net, X[:1], gates()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_edited_predictors_are_asked() -> None:
    """In place, and whatever the edit: kernels and PyTorch read the same tensors."""
    network = skipping()
    before = network(X[:1])
    for name, buffer in network.named_buffers():
        assert "predictor" in name
        buffer.data += torch.randn(buffer.shape)
    found = network(X[:1])
    assert (found - before).abs().max() > 1e-3
    with torch.enable_grad():  # where kernels are not used
        torch.testing.assert_close(network(X[:1].clone().requires_grad_()), found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies(network: nn.Module) -> None:
    network(X[:1])  # a call leaves nothing that a copy would carry
    saved = io.BytesIO()
    torch.save(network, saved)
    saved.seek(0)
    for other in (copy.deepcopy(network), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(other(X[:1]), network(X[:1]), rtol=0, atol=0)
        torch.testing.assert_close(network(X[:5]), masked(plain(), X[:5], gates()), rtol=1e-4, atol=1e-4)
        layers = [layer for layer in other.modules() if isinstance(layer, SelectiveLayer)]
        assert all(is_by_input(layer.weight) for layer in layers if layer.way.native)  # kernels still find their layout


def compiled_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(network, fullgraph=True, backend="eager")  # type: ignore[return-value]


def traced_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(network, X[:1])  # type: ignore[no-any-return, no-untyped-call]


def exported_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.export.export(network, (X[:1],)).module()


def mapped_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda inputs: torch.func.vmap(lambda sample: network(sample[None])[0])(inputs)


def recorded_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return make_fx(network)(X[:1])  # type: ignore[no-any-return]


TRACERS = [compiled_network, traced_network, exported_network, mapped_network, recorded_network]


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_tracers_see_every_course(network: nn.Module, tracer: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    """What was recorded on one input holds for others, which need other channels."""
    network = copy.deepcopy(network)
    recorded = tracer(network)
    for sample in X.split(1)[:4]:
        torch.testing.assert_close(recorded(sample), masked(plain(), sample, gates()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(X[:1]), masked(plain(), X[:1], gates()), rtol=1e-4, atol=1e-4)  # nothing is left behind


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_derivatives(network: nn.Module) -> None:
    direction = torch.randn_like(X[:1])
    _, found = torch.func.jvp(network, (X[:1],), (direction,))
    _, expected = torch.func.jvp(lambda inputs: masked(plain(), inputs, gates()), (X[:1],), (direction,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = network(torch.autograd.forward_ad.make_dual(X[:1], direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected, rtol=1e-4, atol=1e-4)


class Scaled(nn.Conv2d):
    """A convolution with a parameter of its own."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * self.scale


def scaled(net: nn.Sequential) -> None:
    layer = Scaled(32, 48, 3, 2, 1)
    layer.load_state_dict(net[2].state_dict(), strict=False)
    net[2] = layer


def hooked(net: nn.Sequential) -> None:
    net[2].register_forward_hook(lambda layer, args, output: output * 0.5)


def hooked_before(net: nn.Sequential) -> None:
    net[2].register_forward_pre_hook(lambda layer, args: (args[0] * 0.5,))


def normed(net: nn.Sequential) -> None:
    weight_norm(net[2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [(scaled, "Scaled has more than"), (hooked, "Conv2d has hooks"), (hooked_before, "Conv2d has hooks"), (normed, "")],
)
@torch.no_grad()
def test_layers_with_more_than_a_weight_are_computed_whole(change: Callable[[nn.Sequential], None], reason: str) -> None:
    net = plain()
    change(net)
    deployed = deploy(net, channel_units(net), gates(), X[:2], calibrate=False)
    assert list(deployed.masked) == (["0", "2"] if reason else [])
    assert all(f"2: {reason}" in why for why in deployed.masked.values())
    for inputs in (X[2:3], X):
        torch.testing.assert_close(deployed.network(inputs), masked(net, inputs, gates()), rtol=1e-4, atol=1e-4)

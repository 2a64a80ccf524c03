"""Units of channels: a layer that computes them, what acts on each of them alone, and the layers that read them.

In such a unit a channel can be left out as a whole: the rows of the layer that computes it, everything on the way, and the
columns of the layers that read it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from lightning_peft.network.graph import traced_parts
from lightning_peft.network.layers import is_conv, is_weight
from lightning_peft.network.nm_layers import input_dim

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""A function that a unit's channels go through; it can be copied and pickled, and changes nothing in place."""

_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool1d", "avg_pool1d"}
_ACTIVATIONS = {"relu", "relu_", "relu6", "silu", "silu_", "gelu", "hardswish", "leaky_relu", "elu", "mish", "tanh"}
_PASSED = {"dropout", "dropout2d", "contiguous", "feature_dropout"}


@dataclass(frozen=True)
class ChannelUnit:
    """A layer and the way its output channels go, each on its own, by qualified name within the network.

    Attributes:
        producer: Convolution with one group, or linear layer, that computes the channels.
        chain: Layers on the way that are called once: norms, activations, depthwise convolutions, pools.
        gate: The last layer of ``(producer, *chain)`` behind which a channel that is set to zero stays zero.
        activations: Functions between the output of ``gate`` and what the readers see, pools left out.
        consumers: Layers that read the channels and nothing else does; empty when something else does too.
        channels: Number of channels.
        activated: Whether there is an activation on the way; the last layer of a residual branch has none.
    """

    producer: str
    chain: tuple[str, ...]
    gate: str
    activations: tuple[Activation, ...]
    consumers: tuple[str, ...]
    channels: int
    activated: bool


def channel_units(network: nn.Module) -> list[ChannelUnit]:
    """Find the units of a network, in the order in which they run.

    Args:
        network: Any module. Parts whose ``forward`` depends on data are searched below them, so that a network that cannot be
            traced as a whole still has the units of its blocks.

    Returns:
        Every convolution with one group, and every linear layer, that is called once and followed by a batch norm or an
        activation.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> [(unit.producer, unit.chain, unit.consumers) for unit in channel_units(net)]
        [('0', ('1', '2'), ('3',))]
    """
    names = Counter(id(layer) for _, layer in network.named_modules(remove_duplicate=False))
    units = []
    for prefix, graph in traced_parts(network):
        part = network.get_submodule(prefix.removesuffix("."))
        calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            walk = _Walk(part, calls, names)
            if walk.produces(node):
                walk.follow(node)
                if walk.treated:
                    units.append(walk.unit(prefix))
    return units


class _Walk:
    """Follows the channels of one layer through a graph."""

    def __init__(self, part: nn.Module, calls: Counter[str], names: Counter[int]) -> None:
        self._part, self._calls, self._names = part, calls, names
        self._path: list[tuple[str, nn.Module | None, Activation | None]] = []
        self._readers: list[str] = []
        self._activated = False
        self.treated = False

    def _once(self, node: fx.Node) -> nn.Module | None:
        """The layer a node calls, if nothing else calls it."""
        if node.op != "call_module" or self._calls[str(node.target)] > 1:
            return None
        layer = self._part.get_submodule(str(node.target))
        return layer if self._names[id(layer)] == 1 else None

    def produces(self, node: fx.Node) -> bool:
        layer = self._once(node)
        return layer is not None and is_weight(layer) and getattr(layer, "groups", 1) == 1 and hasattr(layer, "bias")

    def follow(self, node: fx.Node) -> None:
        """Walk while each channel is treated on its own and read by one operation."""
        layer = self._part.get_submodule(str(node.target))
        self._channels = int(_weight(layer).shape[1 - input_dim(layer)])
        self._convolution = is_conv(layer)
        self._path.append((str(node.target), layer, None))
        per_channel = 1
        while True:
            readers = [self._reads(user, per_channel) for user in node.users]
            if readers and all(readers):
                self._readers = [str(user.target) for user in node.users]
                return
            if len(node.users) != 1:
                return
            node = next(iter(node.users))
            if self._convolution and self._flattens(node):
                per_channel = 0  # however many positions there are
            elif not self._passes(node):
                return

    def _flattens(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            layer = self._part.get_submodule(str(node.target))
            return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
        return _name(node) == "flatten"

    def _reads(self, node: fx.Node, per_channel: int) -> bool:
        layer = self._once(node)
        if layer is None or not is_weight(layer) or getattr(layer, "groups", 1) != 1 or not hasattr(layer, "bias"):
            return False
        inputs = int(_weight(layer).shape[input_dim(layer)])
        if is_conv(layer) != self._convolution:
            return per_channel == 0 and inputs % self._channels == 0
        return per_channel == 1 and inputs == self._channels

    def _passes(self, node: fx.Node) -> bool:
        """Go over an operation that treats each channel on its own."""
        if node.op in ("call_function", "call_method"):
            return self._passes_function(node)
        if node.op != "call_module":
            return False
        layer = self._part.get_submodule(str(node.target))
        once = self._once(node) is layer
        if _is_channel_norm(layer, self._channels) or _is_depthwise(layer, self._channels):
            if once:
                self.treated |= not is_conv(layer)
                self._activated |= not isinstance(getattr(layer, "act", nn.Identity()), nn.Identity)  # timm's BatchNormAct2d
                self._path.append((str(node.target), layer, None))
            return once
        if _has_parameters(layer) or not _keeps_channels(layer, self._convolution):
            return False
        still = "Pool" in type(layer).__name__ or _idle(layer)
        self._activated |= not still
        self.treated |= not still
        self._path.append((str(node.target) if once else "", layer, None if still else _OfCopy(layer)))
        return True

    def _passes_function(self, node: fx.Node) -> bool:
        name = _name(node)
        if name not in _ACTIVATIONS:
            return name in _PASSED or (name in _POOLS and self._convolution)
        self._path.append(("", None, _Function(node)))
        self._activated = self.treated = True
        return True

    def unit(self, prefix: str) -> ChannelUnit:
        """Describe what was walked."""
        last = max(i for i, (_, layer, _) in enumerate(self._path) if layer is not None and _has_parameters(layer))
        behind = tuple(activation for _, _, activation in self._path[last + 1 :] if activation is not None)
        names = [prefix + name if name else "" for name, _, _ in self._path]
        return ChannelUnit(
            names[0],
            tuple(name for name in names[1:] if name),
            names[last],
            behind,
            tuple(prefix + name for name in self._readers),
            self._channels,
            self._activated,
        )


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


class _Function:
    """An activation called as a function or as a method of its input."""

    def __init__(self, node: fx.Node) -> None:
        self.name = _name(node)
        self._function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        self._arguments: tuple[Any, ...] = tuple(node.args[1:])
        self._keywords: Mapping[str, Any] = {key: value for key, value in node.kwargs.items() if key != "input"}

    def __call__(self, value: Tensor) -> Tensor:
        result: Tensor = self._function(value.clone(), *self._arguments, **self._keywords)  # type: ignore[operator]
        return result


@dataclass(frozen=True)
class _OfCopy:
    """A layer without parameters, given a copy because it may work in place."""

    layer: nn.Module

    def __call__(self, value: Tensor) -> Tensor:
        result: Tensor = self.layer(value.clone())
        return result


def rectifies(activation: Activation | nn.Module) -> bool:
    """Whether an activation never falls and is never negative: its largest output is then that of its largest input.

    Example:
        >>> rectifies(nn.ReLU6()), rectifies(nn.SiLU())
        (True, False)
    """
    if isinstance(activation, _Function):
        return activation.name in ("relu", "relu_", "relu6")
    return type(getattr(activation, "layer", activation)) in (nn.ReLU, nn.ReLU6)


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _has_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _is_channel_norm(layer: nn.Module, channels: int) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.num_features == channels


def _is_depthwise(layer: nn.Module, channels: int) -> bool:
    return is_conv(layer) and [layer.groups, layer.in_channels, layer.out_channels] == [channels] * 3


@torch.no_grad()
def _idle(layer: nn.Module) -> bool:
    """Whether a layer without parameters gives back what it is given in evaluation: a dropout, a stochastic depth; tried."""
    value = torch.linspace(-2.0, 2.0, 32).view(2, 4, 2, 2)
    try:
        result = _evaluated(layer)(value.clone())
    except Exception:  # a layer that wants another input does something with it
        return False
    return isinstance(result, Tensor) and torch.equal(result, value)


def _evaluated(layer: nn.Module) -> nn.Module:
    """A copy that draws nothing: in training a stochastic depth is another function at each call."""
    return copy.deepcopy(layer).eval()


@torch.no_grad()
def _keeps_channels(layer: nn.Module, convolution: bool) -> bool:
    """Whether a layer without parameters treats channels alike and apart, and leaves zeros zero; found by trying."""
    layer = _evaluated(layer)
    shape, dim = ((2, 4, 8, 8), 1) if convolution else ((2, 3, 4), -1)
    value = torch.linspace(-2.0, 2.0, math.prod(shape)).view(shape)
    try:
        part, whole = layer(value.narrow(dim, 0, 2).clone()), layer(value.clone())
        zero = layer(torch.zeros(shape))
    except Exception:  # a layer that wants another input is none of these
        return False
    if not all(isinstance(result, Tensor) and result.ndim == len(shape) for result in (part, whole, zero)):
        return False
    return whole.shape[dim] == shape[dim] and torch.equal(part, whole.narrow(dim, 0, 2)) and not bool(zero.any())

"""Which layers of a network can be two networks of half the width side by side."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.network.layers import heads, is_depthwise, is_weight, own_parameters, public_class
from lightning_peft.network.targets import TargetSpec, select

_BY_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def head_layers(network: nn.Module, head: TargetSpec | None = None) -> dict[str, nn.Module]:
    """Return the layers that write the network's output, by name; found when they are not named."""
    found = heads(dict.fromkeys(network.modules())) if head is None else list(select(network, head).values())
    return {name: layer for name, layer in network.named_modules() if layer in found}


def stem_layers(network: nn.Module, stem: TargetSpec | None = None) -> dict[str, nn.Module]:
    """Return the layers that read the network's input, by name; the first one when they are not named."""
    if stem is not None:
        return select(network, stem)
    weighted = ((name, layer) for name, layer in network.named_modules() if is_weight(layer) or isinstance(layer, nn.Embedding))
    return dict([first]) if (first := next(weighted, None)) is not None else {}


def inner_layers(network: nn.Module, stem: TargetSpec | None = None, head: TargetSpec | None = None) -> dict[str, nn.Module]:
    """Return the layers between stem and head that mix channels, whose inputs and outputs both have two halves, by name.

    Raises:
        MisconfigurationException: There are none, or a layer computes its two halves from one another.

    Example:
        >>> list(inner_layers(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 5))))
        ['2']
    """
    stems, ends = stem_layers(network, stem), head_layers(network, head)
    layers = {name: layer for name, layer in network.named_modules() if "parametrizations" not in name.split(".")}
    for name, layer in layers.items():
        if (reason := _objection(layer, name not in stems, name not in ends)) is not None:
            raise MisconfigurationException(
                f"{name or 'The network'} ({public_class(layer)}) {reason}, so the network is not two members side by side. "
                "MixtureGrowth is for networks of convolutions, linear layers and BatchNorm. Layers that read the network's "
                "input are named by stem=, those that write its output by head=."
            )
    inner = {
        name: layer
        for name, layer in layers.items()
        if name not in stems and name not in ends and is_weight(layer) and not is_depthwise(layer)
    }
    if not inner:
        raise MisconfigurationException(f"{type(network).__name__} has no layer between its first and its last to mix.")
    return inner


def _objection(layer: nn.Module, inputs: bool, outputs: bool) -> str | None:
    """Say why a layer cannot have halves, on the sides that must; ``None`` when it can."""
    if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        return _channel_objection(layer, inputs, outputs)
    if isinstance(layer, nn.GroupNorm):
        return "has an odd number of groups" if layer.num_groups % 2 else None
    if isinstance(layer, nn.LayerNorm):
        return "normalises both halves together"
    if isinstance(layer, _BY_CHANNEL):
        return "has an odd number of channels" if layer.num_features % 2 else None
    if isinstance(layer, nn.Embedding):
        return "has an odd number of columns" if layer.embedding_dim % 2 else None
    return "has parameters that may belong to both halves" if own_parameters(layer) else None


def _channel_objection(layer: nn.Module, inputs: bool, outputs: bool) -> str | None:
    if getattr(layer, "transposed", False):
        return "is a transposed convolution"
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        fits = layer.groups == layer.in_channels and layer.groups % 2 == 0
        return None if fits else "has groups of several channels, or an odd number of them"
    rows, columns = own_parameters(layer)["weight"].shape[:2]
    if inputs and columns % 2:
        return f"has an odd number of inputs, {columns}"
    return f"has an odd number of outputs, {rows}" if outputs and rows % 2 else None

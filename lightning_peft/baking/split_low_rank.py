"""Splitting layers of low rank into two smaller ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.arguments import one_of
from lightning_peft.network.layers import has_class, is_conv, is_linear
from lightning_peft.network.targets import TargetSpec, select
from lightning_peft.weights.low_rank import SCHEMES, Scheme, as_matrix, decompose
from lightning_peft.weights.mapped_layer import is_mapped


def split_low_rank(
    module: nn.Module,
    targets: TargetSpec = "all-weights",
    exclude: TargetSpec | None = None,
    scheme: Scheme = "channel",
    *,
    tolerance: float = 1e-4,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Replace layers, in place, by a ``Sequential`` of two that compute the same, where that takes fewer operations.

    It is an ordinary module afterwards, with other names: ``fc.weight`` becomes ``fc.0.weight`` and ``fc.1.weight``. Give a
    new instance the same structure with ``ranks=`` to load its state dict. Optimizers have to be made anew.

    Args:
        module: A module without weight maps: after the fit, or baked.
        targets: Layers to look at: Linear, Conv1d/2d/3d and HF ``Conv1D``. Grouped convolutions are left whole, and subclasses,
            whose weight other code may read.
        exclude: Layers to leave whole.
        scheme: ``"channel"`` or ``"spatial"``, see :func:`lightning_peft.weights.low_rank.as_matrix`.
        tolerance: Singular values up to this share of the largest are dropped.
        ranks: Names of the layers to split, each with its rank, in place of looking at their weights.

    Returns:
        Rank of every layer that was split, by name.

    Raises:
        MisconfigurationException: An unknown scheme, a rank that does not fit, a weight under maps, or one without a
            decomposition; nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
        >>> _ = nn.init.ones_(net[0].weight)
        >>> split_low_rank(net)
        {'0': 1}
        >>> [tuple(p.shape) for p in net.parameters()]
        [(1, 8), (8, 1)]
    """
    one_of("scheme", scheme, SCHEMES)
    layers = select(module, targets, exclude) if ranks is None else {name: _layer(module, name) for name in ranks}
    made: dict[str, tuple[nn.Module, nn.Module, int]] = {}
    for name, layer in layers.items():
        if is_mapped(layer) or parametrize.is_parametrized(layer):
            raise MisconfigurationException(
                f"{name} is under weight maps. Bake the module first: lightning_peft.bake(copy.deepcopy(module))."
            )
        if not name or not _can_be_split(layer):
            continue
        pair = _split(name, layer, scheme, tolerance, None if ranks is None else ranks[name])
        if pair is not None:
            made[name] = (layer, *pair)
    for parent in list(module.modules()):
        for key, child in list(parent._modules.items()):
            for layer, two, _ in made.values():
                if child is layer:
                    parent._modules[key] = two
    return {name: rank for name, (_, _, rank) in made.items()}


def _layer(module: nn.Module, name: str) -> nn.Module:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise MisconfigurationException(f"ranks= names {name!r}, which {type(module).__name__} does not have.") from None
    if not (_can_be_split(layer) or is_mapped(layer) or parametrize.is_parametrized(layer)):
        raise MisconfigurationException(f"ranks= names {name!r}, a {type(layer).__name__}, which cannot be split.")
    return layer


def _can_be_split(layer: nn.Module) -> bool:
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return bool(layer.groups == 1)
    return type(layer) is nn.Linear or (is_linear(layer) and type(layer).__name__ == "Conv1D")


def _split(name: str, layer: Any, scheme: Scheme, tolerance: float, rank: int | None) -> tuple[nn.Module, int] | None:
    """The two layers and their rank, or nothing if one is cheaper."""
    weight: Tensor = layer.weight.detach()
    weight = weight.t() if has_class(layer, "Conv1D") else weight
    matrix = as_matrix(weight, scheme)
    parts = decompose(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    if parts is None:
        raise MisconfigurationException(f"The weight of {name} has no singular value decomposition: it is not finite.")
    u, sigma, v = parts
    if rank is None:
        rank = max(1, int((sigma > tolerance * sigma[0]).sum()))
        if rank * _cost(layer, weight, scheme) >= weight.numel():
            return None
    elif not 1 <= rank <= len(sigma):
        raise MisconfigurationException(f"ranks= gives {name} {rank}; its weight has {len(sigma)} singular values.")
    root = sigma[:rank].sqrt()
    left, right = (u[:, :rank] * root).to(weight.dtype), (root.unsqueeze(1) * v[:rank]).to(weight.dtype)
    first, second = _pair(layer, weight.shape, scheme, rank, left, right)
    two = nn.Sequential(first, second).to(weight).train(layer.training)
    if layer.bias is not None:
        second.bias.data.copy_(layer.bias.detach())
        second.bias.requires_grad_(layer.bias.requires_grad)
    for part in (first, second):
        part.weight.requires_grad_(layer.weight.requires_grad)
    return two, rank


def _cost(layer: Any, weight: Tensor, scheme: Scheme) -> int:
    """Multiplications of both factors per output position and rank; one layer takes the weight's number of entries."""
    if scheme == "spatial" and weight.ndim == 4:
        outputs, inputs, height, width = weight.shape
        return inputs * height * int(layer.stride[1]) + outputs * width
    return weight.shape[1:].numel() + weight.shape[0]


def _pair(layer: Any, shape: torch.Size, scheme: Scheme, rank: int, left: Tensor, right: Tensor) -> tuple[Any, Any]:
    """Both layers with the factors of ``left @ right``; the second has the bias."""
    bias = layer.bias is not None
    if not is_conv(layer):
        return _filled(nn.Linear(shape[1], rank, bias=False), right), _filled(nn.Linear(rank, shape[0], bias=bias), left)
    settings = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
    kind, mode = type(layer), layer.padding_mode
    if scheme == "channel" or len(shape) != 4:
        first = kind(shape[1], rank, layer.kernel_size, bias=False, padding_mode=mode, **settings)
        second = kind(rank, shape[0], 1, bias=bias)
        return _filled(first, right.view(rank, *shape[1:])), _filled(second, left.view(shape[0], rank, *[1] * (len(shape) - 2)))
    outputs, inputs, height, width = shape
    column, row = ({key: _along(value, axis, key) for key, value in settings.items()} for axis in (0, 1))
    first = nn.Conv2d(inputs, rank, (height, 1), bias=False, padding_mode=mode, **column)
    second = nn.Conv2d(rank, outputs, (1, width), bias=bias, padding_mode=mode, **row)
    return (
        _filled(first, left.view(inputs, height, rank).permute(2, 0, 1).unsqueeze(3)),
        _filled(second, right.view(rank, outputs, width).permute(1, 0, 2).unsqueeze(2)),
    )


def _along(value: Iterable[int] | str, axis: int, key: str) -> Any:
    """Keep a setting of a convolution along one axis only."""
    if isinstance(value, str):
        return value
    neutral = 0 if key == "padding" else 1
    return tuple(size if place == axis else neutral for place, size in enumerate(value))


def _filled(layer: Any, weight: Tensor) -> Any:
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer

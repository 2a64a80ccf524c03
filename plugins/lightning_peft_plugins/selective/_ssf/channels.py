"""The channels that a layer writes, in what it returns and in its weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.layers import has_class, is_linear, is_norm, own_parameters
from lightning_peft.network.plain_class import plain_class
from lightning_peft_plugins.selective.functional.ssf import scale_and_shift, scaled_weight

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Channels:
    """Where the channels of a layer are.

    Attributes:
        count: How many.
        axis: Their dimension in what the layer returns.
        dim: Their dimension in its weight.
        shifted: Whether the layer has a bias, into which a shift can go.
    """

    count: int
    axis: int
    dim: int
    shifted: bool


def channels_of(layer: Any) -> Channels | None:
    """Find the channels of a layer whose scale and shift can go into its weight and bias; ``None`` where they cannot.

    Of a normalisation layer of a class that is not torch's it is tried out: some add a number to their weight, some end in an
    activation, some have their channels elsewhere.

    Example:
        >>> channels_of(nn.Conv2d(3, 8, 1, bias=False))
        Channels(count=8, axis=-3, dim=0, shifted=False)
    """
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    shifted = layer._parameters.get("bias") is not None
    forward = plain_class(layer).forward
    if is_linear(layer):
        transposed = has_class(layer, "Conv1D")
        known = transposed or forward is nn.Linear.forward
        return Channels(weight.shape[int(transposed)], -1, int(transposed), shifted) if known else None
    for place, cls in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if isinstance(layer, cls):
            return Channels(len(weight), -2 - place, 0, shifted) if forward is cls.forward else None
    if not is_norm(layer):
        return None
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return Channels(len(weight), -1, 0, shifted)
    if plain_class(layer) in _NORMS:
        return Channels(len(weight), 1, 0, shifted)
    return next((Channels(len(weight), axis, 0, shifted) for axis in (-1, 1) if _folds(layer, axis)), None)


@torch.no_grad()
def _folds(layer: Any, axis: int) -> bool:
    """Whether a normalisation layer with scaled weight and shifted bias returns what it does, scaled and shifted."""
    twin = copy.deepcopy(layer).eval()
    own = {name: tensor for name, tensor in own_parameters(twin).items() if name in ("weight", "bias")}
    count = len(own["weight"])
    scale = torch.linspace(0.5, 2, count).to(own["weight"])
    shift = scale - 3 if "bias" in own else None
    shape = (2, 3, count) if axis == -1 else (2, count, 3, 3)
    inputs = torch.linspace(-2, 2, 6 * count if axis == -1 else 18 * count).sin().view(shape).to(own["weight"])
    try:
        expected = scale_and_shift(_said(twin, inputs), scale, shift, axis)
        own["weight"].copy_(scaled_weight(own["weight"], scale))
        if shift is not None:
            own["bias"].copy_(own["bias"] * scale + shift)
        return torch.allclose(_said(twin, inputs), expected, rtol=1e-2, atol=1e-2)
    except Exception:  # a layer that takes other inputs says so in its own way
        return False


def _said(layer: nn.Module, inputs: Tensor) -> Tensor:
    output = layer(inputs)
    if not isinstance(output, Tensor) or output.shape != inputs.shape:
        raise ValueError("not a normalisation of what it is given")
    return output

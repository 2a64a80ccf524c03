"""The structure of two layers whose product is one of low rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.layers import has_class, is_conv, is_linear
from lightning_peft.network.plain_class import plain_class
from lightning_peft.structure.replacement import Replacement
from lightning_peft.weights.low_rank import SCHEMES, Scheme


class LowRankPair(Replacement):
    """A ``Sequential`` of two layers with ``rank`` features between them; the bias goes on in the second.

    Args:
        rank: Features between the two.
        scheme: How the weight is laid out as a matrix (:func:`lightning_peft.weights.low_rank.as_matrix`).
    """

    kind = "low_rank_pair"

    def __init__(self, rank: int, scheme: Scheme = "channel") -> None:
        self.rank, self.scheme = rank, scheme

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scheme": self.scheme}

    def check(self, layer: nn.Module) -> None:
        rank, scheme = self.rank, self.scheme
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")
        if not can_be_split(layer):
            raise ValueError(f"a {plain_class(layer).__name__} cannot be split")
        most = max_rank(plain_weight(layer).shape, scheme)
        if type(rank) is not int or not 1 <= rank <= most:
            raise ValueError(f"rank={rank!r} is not a whole number from 1 to {most}")

    def build(self, layer: Any) -> nn.Module:
        weight = plain_weight(layer)
        with torch.device(weight.device):
            first, second = _pair(layer, weight.shape, self.scheme, self.rank)
        two = nn.Sequential(first, second).to(weight.dtype)
        if layer.bias is not None:
            second.bias = layer._parameters["bias"]
        for part in (first, second):
            part.weight.requires_grad_(layer._parameters["weight"].requires_grad)
        return two


def can_be_split(layer: nn.Module) -> bool:
    """Whether a layer can become a pair: Linear, ungrouped convolutions and HF ``Conv1D``.

    Subclasses stay whole, since other code may read their weight.
    """
    kind = plain_class(layer)
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return bool(layer.groups == 1)
    return kind is nn.Linear or (is_linear(layer) and kind.__name__ == "Conv1D")


def plain_weight(layer: nn.Module) -> Tensor:
    """Weight of a layer, outputs first."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.detach().t() if has_class(layer, "Conv1D") else weight.detach()


def max_rank(shape: torch.Size, scheme: Scheme) -> int:
    """Largest rank of a weight laid out by a scheme (:func:`lightning_peft.weights.low_rank.as_matrix`)."""
    if scheme == "spatial" and len(shape) == 4:
        outputs, inputs, height, width = shape
        return min(inputs * height, outputs * width)
    return min(shape[0], shape[1:].numel())


@torch.no_grad()
def fill_pair(two: Any, shape: torch.Size, scheme: Scheme, left: Tensor, right: Tensor) -> None:
    """Give a pair the factors of ``left @ right``, the matrix of a weight.

    Args:
        two: What :meth:`LowRankPair.build` returned.
        shape: Shape of the weight, outputs first.
        scheme: How it was laid out.
        left: ``(rows, rank)``.
        right: ``(rank, columns)``.
    """
    rank = len(right)
    if scheme == "spatial" and len(shape) == 4:
        outputs, inputs, height, width = shape
        two[0].weight.copy_(left.view(inputs, height, rank).permute(2, 0, 1).unsqueeze(3))
        two[1].weight.copy_(right.view(rank, outputs, width).permute(1, 0, 2).unsqueeze(2))
    else:
        two[0].weight.copy_(right.view(rank, *shape[1:]))
        two[1].weight.copy_(left.view(shape[0], rank, *[1] * (len(shape) - 2)))


def _pair(layer: Any, shape: torch.Size, scheme: Scheme, rank: int) -> tuple[Any, Any]:
    bias = layer.bias is not None
    if not is_conv(layer):
        return nn.Linear(shape[1], rank, bias=False), nn.Linear(rank, shape[0], bias=bias)
    settings = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
    kind: Any = plain_class(layer)
    mode = layer.padding_mode
    if scheme == "channel" or len(shape) != 4:
        first = kind(shape[1], rank, layer.kernel_size, bias=False, padding_mode=mode, **settings)
        return first, kind(rank, shape[0], 1, bias=bias)
    outputs, inputs, height, width = shape
    column, row = ({key: _along(value, axis, key) for key, value in settings.items()} for axis in (0, 1))
    first = nn.Conv2d(inputs, rank, (height, 1), bias=False, padding_mode=mode, **column)
    return first, nn.Conv2d(rank, outputs, (1, width), bias=bias, padding_mode=mode, **row)


def _along(value: Iterable[int] | str, axis: int, key: str) -> Any:
    """Keep a setting of a convolution along one axis only."""
    if isinstance(value, str):
        return value
    neutral = 0 if key == "padding" else 1
    return tuple(size if place == axis else neutral for place, size in enumerate(value))

"""Coordinates of tensors whose dimensions are products of axes, and how they find their place when an axis grows.

A dimension is written as in einops, a product of axes and numbers: the rows of a fused qkv projection are
``"3 heads head_dim"``, those of a grouped query projection ``"kv_heads groups head_dim"``. New units come after the old ones of
their axis, and unit ``u`` stems from old unit ``u mod old``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Axes: TypeAlias = Mapping[str, Sequence[int]]
"""Old and new number of units by axis, for instance ``{"width": [12, 20], "heads": [3, 5], "head_dim": [4, 4]}``."""

Rule: TypeAlias = Literal["copy", "pad"]
OLD, NEW = 0, 1


def size(dim: str, axes: Axes, when: int = NEW) -> int:
    """Number of coordinates of a dimension, after (or with ``when=0`` before) the edit.

    Example:
        >>> size("3 heads head_dim", {"heads": [3, 5], "head_dim": [4, 4]})
        60
    """
    return math.prod(_units(factor, axes)[when] for factor in dim.split())


def index_map(dim: str, axes: Axes, mapping: Mapping[str, Tensor] | None = None) -> Tensor:
    """Old coordinate that every new coordinate stems from.

    Args:
        dim: Product of axes.
        axes: Old and new sizes.
        mapping: Old unit of every new unit, by axis; circular where not given.

    Returns:
        Integers, shape ``(size(dim, axes),)``.

    Example:
        >>> index_map("2 heads 2", {"heads": [2, 3]})
        tensor([0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5])
    """
    index = torch.zeros(1, dtype=torch.long)
    for factor in dim.split():
        old, new = _units(factor, axes)
        units = torch.arange(new) % old if mapping is None or factor not in mapping else mapping[factor]
        index = (index[:, None] * old + units).flatten()
    return index


def is_old(dim: str, axes: Axes) -> Tensor:
    """Whether a new coordinate is an old one that stayed; those are in their old order.

    Example:
        >>> is_old("2 heads", {"heads": [2, 3]})
        tensor([ True,  True, False,  True,  True, False])
    """
    kept = torch.ones(1, dtype=torch.bool)
    for factor in dim.split():
        old, new = _units(factor, axes)
        kept = (kept[:, None] & (torch.arange(new) < old)).flatten()
    return kept


def _units(factor: str, axes: Axes) -> tuple[int, int]:
    if factor.isdigit():
        return int(factor), int(factor)
    old, new = axes[factor]
    return old, new


def resized(tensor: Tensor, dims: Sequence[str], axes: Axes, rule: Rule = "pad") -> Tensor:
    """Bring a tensor to new sizes.

    Args:
        tensor: Old sizes.
        dims: A product for each dimension; ``""`` leaves one as it is.
        axes: Old and new sizes.
        rule: ``"copy"``: every new coordinate gets what its source has; ``"pad"``: it gets zero.

    Returns:
        New sizes.

    Example:
        >>> resized(torch.tensor([1.0, 2.0]), ["width"], {"width": [2, 3]}, "copy")
        tensor([1., 2., 1.])
        >>> resized(torch.tensor([1.0, 2.0]), ["width"], {"width": [2, 3]}, "pad")
        tensor([1., 2., 0.])
    """
    for position, dim in enumerate(dims):
        if size(dim, axes, OLD) == size(dim, axes, NEW):
            continue
        if rule == "copy":
            tensor = tensor.index_select(position, index_map(dim, axes).to(tensor.device))
            continue
        places = is_old(dim, axes).nonzero().flatten().to(tensor.device)
        shape = [*tensor.shape[:position], size(dim, axes), *tensor.shape[position + 1 :]]
        tensor = tensor.new_zeros(shape).index_copy_(position, places, tensor)
    return tensor

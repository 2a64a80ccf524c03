"""Numbers that layers note, as attributes or as buffers, and among them roots of sizes.

Gemma multiplies embeddings by the root of its width. Its class makes that in single precision, and a network that was brought
to half precision and back holds a coarser one. So an old root is recognised where it is near, and a new one is as the class
makes it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

_NEAR = 2**-7  # the coarsest rounding is that of bfloat16

ROOT = "root "
"""Begins the dimension of a number that is the root of a product of axes."""


def noted(layer: nn.Module, key: str) -> Any:
    """A number that a layer notes about itself, as an attribute or as a buffer without dimensions; ``None`` where it has none.

    Example:
        >>> noted(nn.Linear(2, 3), "out_features")
        3
    """
    buffer = layer._buffers.get(key)
    return float(buffer) if buffer is not None and not buffer.ndim and buffer.is_floating_point() else vars(layer).get(key)


def note(layer: nn.Module, key: str, value: Any) -> None:
    """Write such a number; a buffer keeps its dtype and device."""
    buffer = layer._buffers.get(key)
    if buffer is None:
        setattr(layer, key, value)
    else:
        layer._buffers[key] = buffer.new_tensor(value)


def agrees(layer: nn.Module, key: str, value: Any, expected: Any) -> bool:
    """Whether a number that a layer notes is the expected one; in a buffer it may have been rounded."""
    if key in layer._buffers and isinstance(value, float) and isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=_NEAR)
    return bool(value == expected)


def root_change(layer: nn.Module, key: str, sizes: tuple[int, int]) -> list[float] | None:
    """Old and new value of a number that is the root of a size; ``None`` where it is no such root."""
    value, (old, new) = noted(layer, key), sizes
    if not is_root(value, old):
        return None
    return [value, float(torch.tensor(new**0.5, dtype=torch.float32)) if _is_single(layer, key) else new**0.5]


def is_root(value: object, size: int) -> bool:
    """Whether a number is the root of a size.

    Example:
        >>> is_root(55.5, 3072), is_root(55.5, 3000)
        (True, False)
    """
    return isinstance(value, float) and math.isclose(value, size**0.5, rel_tol=_NEAR)


def root_ratio(layer: nn.Module, key: str, dtype: torch.dtype, sizes: tuple[int, int]) -> float:
    """What a weight is multiplied by before a change of size over what it is multiplied by after, both in its precision.

    Args:
        layer: The layer that may note the root.
        key: As what; a class without it multiplies beside the layer.
        dtype: Dtype of the weight.
        sizes: Old and new size.
    """
    change = root_change(layer, key, sizes) or [size**0.5 for size in sizes]
    like = layer._buffers.get(key)
    old, new = (torch.tensor(value, dtype=dtype if like is None else like.dtype) for value in change)
    return float(old.to(dtype)) / float(new.to(dtype))


def _is_single(layer: nn.Module, key: str) -> bool:
    """Whether a number is a buffer that holds no more than single precision."""
    buffer = layer._buffers.get(key)
    return buffer is not None and torch.equal(buffer.float().to(buffer.dtype), buffer)

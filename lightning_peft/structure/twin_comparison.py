"""Two networks that one class builds, compared: tensors, layers, and the plain attributes that differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

MISSING = object()
"""What stands for an attribute that a layer does not have."""

_NOT_COMPARED = {*vars(nn.Module()), "_is_hf_initialized", "forward"}


def blocks_of(network: nn.Module, path: str) -> list[nn.Module]:
    """The entries of a list, a block for every position it stands in; none when there is no such list."""
    try:
        return list(network.get_submodule(path)._modules.values())  # type: ignore[arg-type]
    except AttributeError:
        return []


def difference(now: nn.Module, then: nn.Module, inside: str, sources: Sequence[int]) -> str | None:
    """The first tensor or layer that the edited network will not have as the class builds it."""
    start = f"{inside}."
    sides = [
        _Parts({name: each for name, each in net.named_modules() if not f"{name}.".startswith(start)}) for net in (now, then)
    ]
    if (found := sides[0].difference(sides[1])) is not None:
        return found
    for place, source in enumerate(sources):
        kept, wanted = (_Parts(dict(blocks_of(net, inside)[at].named_modules())) for net, at in ((now, source), (then, place)))
        if (found := kept.difference(wanted)) is not None:
            return f"at position {place}, where a copy of block {source} would stand, {found}"
    return None


class _Parts:
    """Layers and tensors of a part of a network."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.tensors = {
            f"{name}.{key}" if name else key: tuple(tensor.shape)
            for name, layer in layers.items()
            for key, tensor in (*layer._parameters.items(), *layer._buffers.items())
            if tensor is not None and key not in layer._non_persistent_buffers_set
        }

    def difference(self, other: _Parts) -> str | None:
        for name in sorted({*self.tensors, *other.tensors}):
            mine, theirs = self.tensors.get(name), other.tensors.get(name)
            if mine != theirs:
                shown = ["none" if shape is None else list(shape) for shape in (theirs, mine)]
                return f"{name} {shown[0]} instead of {shown[1]}"
        for name in sorted({*self.layers, *other.layers}):
            both = [parts.layers.get(name) for parts in (self, other)]
            classes = [None if layer is None else type(layer).__name__ for layer in both]
            if classes[0] != classes[1] and any(layer is not None and has_tensors(layer) for layer in both):
                return f"{name or 'the block'} of class {classes[1]} instead of {classes[0]}"
        return None


def has_tensors(layer: nn.Module) -> bool:
    """Whether a layer has any parameter or buffer."""
    return any(True for _ in (*layer.parameters(), *layer.buffers()))


def moved(live: Any, now: Any, then: Any) -> dict[str, Any]:
    """Plain attributes that two twins have otherwise and the live part has as the first one; what a user changed stays."""
    own, before, after = (vars(each) for each in (live, now, then))
    found = {}
    for key in {**before, **after}:
        if key in _NOT_COMPARED or (isinstance(live, nn.Module) and key == "config"):
            continue
        values = [entry.get(key, MISSING) for entry in (before, after)]
        if not all(map(_is_plain, values)) or not _equal(own.get(key, MISSING), values[0]):
            continue
        if _equal(*values) and key != "drop_prob":  # the line through the rates has been drawn again by then
            continue
        if values[1] is not MISSING or key not in getattr(then, "_modules", {}):
            found[key] = values[1]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    simple = (int, float, str, bool, type(None), torch.dtype, FunctionType, BuiltinFunctionType)
    return value is MISSING or isinstance(value, simple)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))  # rates are drawn in other precisions
    return type(a) is type(b) and bool(a == b)

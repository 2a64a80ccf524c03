"""Arguments of a network's call, by shape and range: a record that can be kept in a checkpoint without anybody's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.structure.forms import dict_of, fields, flag, list_of, number, text, whole

_MOST = 2**28  # numbers in one input of one sample


def record(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a call for one sample, as plain data.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The call with each tensor as its shape, dtype and range; batch dimensions, those of the first tensor's length, become 1.

    Example:
        >>> record((torch.ones(8, 3),), {"mask": None})["args"]
        [{'shape': [1, 3], 'dtype': 'float32', 'range': [1.0, 1.0]}]
    """
    first = next((value for value in leaves([*args, *kwargs.values()]) if isinstance(value, Tensor) and value.ndim), None)
    batch = len(first) if first is not None else 0
    return {
        "args": [_described(value, batch) for value in args],
        "kwargs": {key: _described(value, batch) for key, value in kwargs.items()},
    }


def leaves(value: Any) -> list[Any]:
    """What mappings, lists and tuples hold, in order."""
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def _described(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        shape = [1 if place == 0 and size == batch else size for place, size in enumerate(value.shape)]
        return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch."), "range": _range(value)}
    if isinstance(value, Mapping):
        return {"items": {str(key): _described(item, batch) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_described(item, batch) for item in value], "tuple": isinstance(value, tuple)}
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


def _range(value: Tensor) -> list[float]:
    """Smallest and largest number of a tensor, where it has such."""
    if not value.numel() or value.is_complex():
        return [0.0, 1.0]
    ends = [float(end) for end in value.detach().double().aminmax()]
    return ends if all(map(math.isfinite, ends)) else [0.0, 1.0]


def call(
    network: Callable[..., Any],
    example: Mapping[str, Any],
    device: torch.device,
    draw: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Call a network as recorded.

    Args:
        network: The network.
        example: The record.
        device: Where it is.
        draw: Draws the numbers, from the range that each tensor had; without it they are ones, and zeros where integers.
        dtype: Type of the real numbers, by default as recorded.
    """

    def made(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "shape" in value:
            return _tensor(value, draw, dtype).to(device) if draw is not None else _constant(value, device)
        if "items" in value:
            return {key: made(item) for key, item in value["items"].items()}
        found = [made(item) for item in value["list"]]
        return tuple(found) if value["tuple"] else found

    return network(*map(made, example["args"]), **{key: made(value) for key, value in example["kwargs"].items()})


def _constant(value: Mapping[str, Any], device: torch.device) -> Tensor:
    dtype: torch.dtype = getattr(torch, value["dtype"])
    make = torch.ones if dtype.is_floating_point or dtype is torch.bool else torch.zeros
    return make(value["shape"], dtype=dtype, device=device)


def _tensor(value: Mapping[str, Any], draw: torch.Generator, real: torch.dtype | None) -> Tensor:
    own: torch.dtype = getattr(torch, value["dtype"])
    if own is torch.bool or own.is_complex or "range" not in value:  # recorded before ranges were
        made = _constant(value, torch.device("cpu"))
    else:
        low, high = value["range"]
        share = torch.rand(value["shape"], generator=draw, dtype=torch.float64)
        made = low + share * (high - low) if own.is_floating_point else (low + share * (high - low + 1)).floor().clamp(max=high)
    return made.to(real if real is not None and own.is_floating_point else own)


def example_form(value: Any, place: str) -> str | None:
    """Form of the result of :func:`record`, with tensors no larger than a call may need; earlier versions kept no range."""
    return fields({"args": list_of(_value_form), "kwargs": dict_of(_value_form)})(value, place)


def _value_form(value: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        plain = value is None or isinstance(value, (bool, int, float, str))
        return None if plain else f"{place} is not a recorded argument"
    if "shape" in value:
        ranged = {"range": list_of(number(), 2)} if "range" in value else {}
        if (found := fields({"shape": list_of(whole()), "dtype": text, **ranged})(value, place)) is not None:
            return found
        known = isinstance(getattr(torch, value["dtype"], None), torch.dtype)
        return None if known and math.prod(value["shape"]) <= _MOST else f"{place} is not a tensor that can be made"
    if "items" in value:
        return fields({"items": dict_of(_value_form)})(value, place)
    return fields({"list": list_of(_value_form), "tuple": flag})(value, place)

"""Arguments of a network's call, by shape only: a record that can be kept in a checkpoint without anybody's data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.structure.forms import dict_of, fields, flag, list_of, text, whole

_MOST = 2**28  # numbers in one input of one sample


def record(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a call for one sample, as plain data.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The call with each tensor as its shape and dtype; batch dimensions, those of the first tensor's length, become 1.

    Example:
        >>> record((torch.ones(8, 3),), {"mask": None})["args"]
        [{'shape': [1, 3], 'dtype': 'float32'}]
    """
    first = next((value for value in _leaves([*args, *kwargs.values()]) if isinstance(value, Tensor) and value.ndim), None)
    batch = len(first) if first is not None else 0
    return {
        "args": [_described(value, batch) for value in args],
        "kwargs": {key: _described(value, batch) for key, value in kwargs.items()},
    }


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _described(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        shape = [1 if place == 0 and size == batch else size for place, size in enumerate(value.shape)]
        return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"items": {str(key): _described(item, batch) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_described(item, batch) for item in value], "tuple": isinstance(value, tuple)}
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


def call(network: nn.Module, example: Mapping[str, Any], device: torch.device) -> Any:
    """Call a network as recorded, with ones for real numbers and zeros for integers."""
    args = [_made(value, device) for value in example["args"]]
    return network(*args, **{key: _made(value, device) for key, value in example["kwargs"].items()})


def _made(value: Any, device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    if "shape" in value:
        dtype: torch.dtype = getattr(torch, value["dtype"])
        make = torch.ones if dtype.is_floating_point or dtype is torch.bool else torch.zeros
        return make(value["shape"], dtype=dtype, device=device)
    if "items" in value:
        return {key: _made(item, device) for key, item in value["items"].items()}
    made = [_made(item, device) for item in value["list"]]
    return tuple(made) if value["tuple"] else made


def example_form(value: Any, place: str) -> str | None:
    """Form of the result of :func:`record`, with tensors no larger than a call may need."""
    return fields({"args": list_of(_value_form), "kwargs": dict_of(_value_form)})(value, place)


def _value_form(value: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        plain = value is None or isinstance(value, (bool, int, float, str))
        return None if plain else f"{place} is not a recorded argument"
    if "shape" in value:
        if (found := fields({"shape": list_of(whole()), "dtype": text})(value, place)) is not None:
            return found
        known = isinstance(getattr(torch, value["dtype"], None), torch.dtype)
        return None if known and math.prod(value["shape"]) <= _MOST else f"{place} is not a tensor that can be made"
    if "items" in value:
        return fields({"items": dict_of(_value_form)})(value, place)
    return fields({"list": list_of(_value_form), "tuple": flag})(value, place)

"""Data that may go into a checkpoint: ``torch.load(weights_only=True)`` gives back in every version of torch."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor


def not_plain(value: Any, path: str = "") -> str | None:
    """Say where a nest holds something that is no plain data; ``None`` when all of it is.

    Plain are tensors, numbers, strings, bytes, ``None``, and lists, tuples and dicts of these with strings or integers as
    keys. NumPy scalars, sets, paths and dataclasses are not.

    Example:
        >>> not_plain({"ranks": [1, {2}]})
        "['ranks'][1] is a set"
    """
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                return f"{path} has the key {key!r}"
            if (found := not_plain(item, f"{path}[{key!r}]")) is not None:
                return found
        return None
    if type(value) in (list, tuple, torch.Size):
        return next(filter(None, (not_plain(item, f"{path}[{i}]") for i, item in enumerate(value))), None)
    plain = value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, Tensor)
    return None if plain else f"{path or 'it'} is a {type(value).__name__}"

"""Copies of networks that are in use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def deep_copy(module: M, memo: dict[int, Any] | None = None) -> M:
    """Copy a module; results of its last call that it still holds (a recurrent state, a cache) leave their graph.

    ``copy.deepcopy`` alone refuses a module that holds such a tensor.

    Args:
        module: The module.
        memo: What stands for parts of it in the copy, by ``id``, as for ``copy.deepcopy``.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.last = layer.weight * 2
        >>> deep_copy(layer).last.requires_grad
        False
    """
    results = {id(tensor): tensor.detach().clone() for part in module.modules() for tensor in _results(vars(part))}
    return copy.deepcopy(module, {**results, **(memo or {})})


def _results(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _results(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _results(each)

"""What each process of a training has, brought together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_peft.weights.shards import is_shard


def of_ranks(value: Any) -> list[Any]:
    """Return what every process has, in the order of their ranks; every one has to ask. Alone, it is a list of one.

    Args:
        value: What this process has, anything that can be pickled.

    Example:
        >>> of_ranks("mine")
        ['mine']
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def mean_over_ranks(strategy: Strategy, gradient: Tensor) -> Tensor:
    """Return the mean of what each process has of a gradient; every one has to ask.

    Args:
        strategy: The strategy.
        gradient: The gradient; one that is spread over processes was reduced when it came, and is left as it is.
    """
    if is_shard(gradient):
        return gradient
    reduced: Any = strategy.reduce(gradient, reduce_op="mean")
    return reduced  # type: ignore[no-any-return]

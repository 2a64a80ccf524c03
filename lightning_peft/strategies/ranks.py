"""What each process of a training has, brought together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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

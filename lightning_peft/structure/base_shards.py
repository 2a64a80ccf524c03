"""Whether tensors that are spread over processes are still those of a base, gathered once and not at every save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

from lightning_peft.weights.shards import whole

_SEEN: dict[tuple[Any, ...], str] = {}
"""Digests of this process's shards of tensors that were found to be those of a base, by digest and layout of the whole."""


def is_still(shards: Any, wanted: str, digest: Callable[[Any], str]) -> bool:
    """Whether a tensor has a digest; every process that holds shards of it has to ask.

    Args:
        shards: The tensor.
        wanted: The digest of all of it.
        digest: Returns that of a whole tensor.
    """
    layout = (wanted, tuple(shards.shape), shards.device_mesh, shards.placements)
    own = digest(shards.to_local())
    if layout in _SEEN:  # then it is the same on every rank or on none, and the whole differs where a shard does
        return _everywhere(_SEEN[layout] == own, shards)
    if digest(whole(shards)) != wanted:
        return False
    _SEEN[layout] = own
    return True


def _everywhere(holds: bool, shards: Any) -> bool:
    found = torch.tensor(int(holds), device=shards.device)
    for dim in range(shards.device_mesh.ndim):
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, shards.device_mesh.get_group(dim))
    return bool(found)

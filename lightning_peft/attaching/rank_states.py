"""State that each rank has of its own, since it saw its own samples, in a checkpoint that one of them writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_peft.contract import Contract
from lightning_peft.strategies.ranks import of_ranks


def of_all(method: Contract, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each rank has under a method's ``rank_state``, in their order; nothing where there is one rank.

    Every rank has to ask, as Lightning has all of them do when it saves.
    """
    if not method.rank_state or method.run is None or method.run.trainer.world_size == 1:
        return []
    return of_ranks({key: tree_map(_on_cpu, state[key]) for key in sorted(method.rank_state)})


def for_this_rank(method: Contract, state: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a method's state as this rank goes on from it.

    Args:
        method: The method.
        state: Its state, of the rank that wrote the file.
        ranks: What :func:`of_all` returned then.
    """
    if not method.rank_state:
        return dict(state)
    found = ranks or [{key: state[key] for key in method.rank_state}]
    size, rank = (1, 0) if method.run is None else (method.run.trainer.world_size, method.run.trainer.global_rank)
    if len(found) == size:
        return {**state, **found[rank]}
    return {**state, **{key: method.pooled(key, [each[key] for each in found], rank) for key in method.rank_state}}


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value

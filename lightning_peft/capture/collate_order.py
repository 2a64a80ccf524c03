"""Whether a collate function leaves samples in the order they were drawn in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate

from lightning_peft.capture.once_more import RandomState

_LOOKED_AT = 4  # samples


def reorders(loader: DataLoader[Any], positions: Sequence[int]) -> bool:
    """Say whether a loader's collate function sorts: some samples are collated as they come, and once more in reverse.

    Random numbers are left as they were. What cannot be told, because the function mixes samples or takes whole batches only,
    counts as in order.

    Args:
        loader: The loader.
        positions: Positions of the samples of one batch.
    """
    collate: Callable[[list[Any]], Any] | None = loader.collate_fn
    places = list(dict.fromkeys(positions))[:_LOOKED_AT]
    if collate is None or collate is default_collate or len(places) < 2:
        return False
    with RandomState().again():
        try:
            samples = [loader.dataset[place] for place in places]
            random = RandomState()
            forward = collate(list(samples))
            with random.again():
                backward = collate(samples[::-1])
        except Exception:  # whatever a user's code raises where it is used in a way it was not made for
            return False
    pairs = zip(tree_leaves(forward), tree_leaves(backward), strict=False)
    return any(_sorted(a, b) for a, b in pairs if _is_row_wise(a, len(places)) and _is_row_wise(b, len(places)))


def _is_row_wise(leaf: object, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows


def _sorted(forward: Tensor, backward: Tensor) -> bool:
    """Whether the rows of one are those of the other, all different, and not in reverse."""
    if forward.shape != backward.shape:
        return False
    a, b = (rows.reshape(len(rows), -1) for rows in (forward, backward))
    equal = (a[:, None] == b[None]).all(-1)
    once = bool((equal.sum(0) == 1).all() and (equal.sum(1) == 1).all())
    return once and not torch.equal(equal, torch.eye(len(a), dtype=torch.bool).flip(0))

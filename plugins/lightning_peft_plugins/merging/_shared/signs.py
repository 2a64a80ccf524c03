"""Trimming of small differences, and the sign that differences elect."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.kth_largest import kth_largest
from lightning_peft.merging.merge_function import Stacks


def check_density(density: float) -> None:
    """Refuse a density that is none.

    Raises:
        MergeError: It is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise MergeError(f"density={density!r} must be above 0 and at most 1: the share of each difference that stays.")


def thresholds(stacks: Stacks, density: float) -> Tensor:
    """Find the magnitude that a share of each model's differences reaches.

    As the code of TIES counts, one entry more than the share stays: the k-th smallest with ``k = d - int(d * density)``.

    Args:
        stacks: Differences, ``(n, entries)`` a piece.
        density: The share.

    Returns:
        ``(n,)``.
    """
    check_density(density)
    if density == 1:
        return torch.zeros(len(next(stacks())))
    return kth_largest(lambda: (piece.abs() for piece in stacks()), lambda total: min(total, int(total * density) + 1))


def trim_(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Set differences below their model's threshold to zero, in place."""
    floor = thresholds.to(deltas.dtype).view(-1, *[1] * (deltas.dim() - 1))
    return deltas.masked_fill_(deltas.abs() < floor, 0)


def elected(deltas: Tensor, otherwise: Callable[[], Tensor]) -> Tensor:
    """Return the sign of the sum over models, ``(*shape)``.

    Args:
        deltas: Differences, ``(n, *shape)``.
        otherwise: Called for the sign of entries that cancel out, where there are such.
    """
    sign = deltas.sum(0).sign_()
    undecided = sign == 0
    if bool((undecided & deltas.any(0)).any()):
        sign = torch.where(undecided, otherwise().to(sign.dtype), sign)
    return sign


def majority(stacks: Stacks, thresholds: Tensor) -> Callable[[], Tensor]:
    """Return what finds the sign that most entries elect after trimming; -1 where there are as many of both.

    Hardly ever does a sum cancel out, so nobody looks before one has.
    """

    @cache
    def find() -> Tensor:
        votes = (trim_(piece, thresholds).sum(0).sign_().sum(dtype=torch.float64) for piece in stacks())
        return torch.where(torch.stack(list(votes)).sum() > 0, 1.0, -1.0)

    return find


def disjoint_mean(deltas: Tensor, signs: Tensor) -> Tensor:
    """Average, entry by entry, the differences that have the elected sign; zero where there is none.

    Args:
        deltas: Differences, ``(n, *shape)``.
        signs: ``(*shape)``.

    Returns:
        ``(*shape)``.
    """
    agreed = (deltas * signs).clamp_(min=0)
    count = agreed.sign().sum(0).clamp_(min=1)
    return agreed.sum(0).div_(count).mul_(signs)


def disjoint_sum(deltas: Tensor, signs: Tensor) -> Tensor:
    """Add, entry by entry, the differences that have the elected sign, like :func:`disjoint_mean`."""
    return (deltas * signs).clamp_(min=0).sum(0).mul_(signs)


def election(stacks: Stacks, density: float, join: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what merges differences as TIES does.

    Args:
        stacks: All differences, from which it finds where to trim.
        density: Share of each model's differences that stays.
        join: :func:`disjoint_mean` or :func:`disjoint_sum`.

    Returns:
        A function of differences, ``(n, *shape)``, that returns ``(*shape)``.
    """
    floors = thresholds(stacks, density)
    most = majority(stacks, floors)

    def merge(deltas: Tensor) -> Tensor:
        trimmed = trim_(deltas.clone(), floors)
        return join(trimmed, elected(trimmed, most))

    return merge

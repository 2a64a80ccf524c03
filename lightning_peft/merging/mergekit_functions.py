"""The arithmetic of mergekit's methods, step by step as it computes, so that its configurations give its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.kth_largest import kth_largest
from lightning_peft.merging.merge_function import merge_function
from lightning_peft.merging.stacks import PIECE

_SMALL = 1e-7  # sums below it are not rescaled by


@merge_function(elementwise=True)
def linear(models: Tensor, *, weight: tuple[float, ...], normalize: bool = True) -> Tensor:
    """Weigh and add models."""
    weights = _column(weight, models)
    merged = (weights * models).sum(0)
    return merged / weights.sum(0) if normalize else merged


@merge_function(elementwise=True)
def task_arithmetic(deltas: Tensor, *, weight: tuple[float, ...], normalize: bool = False, lambda_: float = 1.0) -> Tensor:
    """Weigh and add differences."""
    return _summed(deltas, weight, normalize, lambda_)


@merge_function()
def ties(
    deltas: Tensor,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Keep the largest differences of each tensor and average, by weight, those that agree with the sign of their sum."""
    for row, share in zip(deltas, density, strict=True):
        before = row.abs().sum()
        keep_largest_(row, share)
        if rescale and share < 1:
            _rescale_(row, before)
    return _agreed(deltas, weight, normalize, lambda_)


@merge_function()
def dare(
    deltas: Tensor,
    generators: list[Generator],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    elect: bool = False,
) -> Tensor:
    """Drop differences at random, then merge as :func:`ties` or :func:`task_arithmetic` do; chance is another one's."""
    for row, share, generator in zip(deltas, density, generators, strict=True):
        if share < 1:
            before = row.abs().sum()
            row.masked_fill_(torch.rand(row.shape, generator=generator) >= share, 0)
            if rescale:
                _rescale_(row, before)
    return (_agreed if elect else _summed)(deltas, weight, normalize, lambda_)


def keep_largest_(values: Tensor, density: float) -> None:
    """Set all but a share of a tensor's entries to zero, in place; of equal ones at the edge the first stay.

    Raises:
        MergeError: None would stay.
    """
    if density >= 1:
        return
    flat = values.view(-1)
    left = int(density * len(flat))
    if left < 1:
        raise MergeError(
            f"density={density} leaves nothing of a tensor of shape {tuple(values.shape)}. mergekit refuses that too: raise it."
        )
    pieces = [flat[start : start + PIECE] for start in range(0, len(flat), PIECE)]
    edge = kth_largest(lambda: (piece.abs()[None] for piece in pieces), lambda total: left)
    left -= sum(int((piece.abs() > edge).sum()) for piece in pieces)
    for piece in pieces:
        sizes = piece.abs()
        keep = sizes > edge
        equal = (sizes == edge).nonzero()[:left]
        keep[equal] = True
        left -= len(equal)
        piece.masked_fill_(~keep, 0)


def _rescale_(values: Tensor, before: Tensor) -> None:
    """Give a tensor the sum of magnitudes that it had before."""
    after = values.abs().sum()
    if min(before, after) >= _SMALL:
        values.mul_(before / after)


def _column(weight: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(weight, dtype=like.dtype).view(-1, *[1] * (like.dim() - 1))


def _pieces(stack: Tensor) -> Iterator[slice]:
    size, step = stack.shape[1], max(1, PIECE // len(stack))
    return (slice(start, start + step) for start in range(0, size, step))


def _summed(deltas: Tensor, weight: tuple[float, ...], normalize: bool, lambda_: float) -> Tensor:
    """Weigh and add."""
    weights = _column(weight, deltas)
    merged = (deltas * weights).sum(0)
    if normalize:
        whole = weights.sum(0)
        merged /= torch.where(whole.abs() < 1e-8, 1, whole)
    return merged.mul_(lambda_) if lambda_ != 1 else merged


def _agreed(deltas: Tensor, weight: tuple[float, ...], normalize: bool, lambda_: float) -> Tensor:
    """Weigh, and add those that have the sign of their sum; sums of zero count as positive."""
    stack = deltas.view(len(deltas), -1)
    merged = torch.empty_like(stack[0])
    weights = _column(weight, stack)
    for piece in _pieces(stack):
        weighed = stack[:, piece] * weights
        agree = torch.where(weighed.sum(0) >= 0, weighed > 0, weighed < 0)
        part = weighed.mul_(agree).sum(0)
        if normalize:
            whole = (weights * agree).sum(0)
            part /= whole.masked_fill_(whole == 0, 1)
        merged[piece] = part.mul_(lambda_) if lambda_ != 1 else part
    return merged.view(deltas.shape[1:])

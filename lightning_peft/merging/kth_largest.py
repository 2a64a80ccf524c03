"""The k-th largest of numbers that come in pieces, exact, in the memory of a small table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_DIGIT = 16  # bits that one look settles


def kth_largest(pieces: Callable[[], Iterator[Tensor]], count: Callable[[int], int]) -> Tensor:
    """Find, for each model, the k-th largest of its numbers, none of which is negative.

    Floating-point numbers that are not negative are ordered as the integers that have their bits. Of these a look at all
    pieces counts how many begin with which 16 bits, which settles them; the next look counts the following 16 among those
    that begin so.

    Args:
        pieces: Goes through all numbers, ``(n, entries)`` each, in float32 or float64; can be called again.
        count: From how many numbers a model has to ``k``, from 1 to that many.

    Returns:
        ``(n,)``: numbers that are there.

    Example:
        >>> kth_largest(lambda: iter([torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 5.0]])]), lambda total: 2)
        tensor([3.])
    """
    heads: Tensor | None = None
    left: Tensor | None = None
    place, dtype = 0, torch.float32
    while heads is None or place < _bits(dtype):
        table, dtype = _table(pieces, heads, place)
        if left is None:
            left = torch.full((len(table),), count(int(table[0].sum())))
        at_least = table.flip(1).cumsum(1)
        digit = (at_least < left[:, None]).sum(1)  # of the flipped table
        before = torch.where(digit > 0, at_least.gather(1, (digit - 1).clamp(min=0)[:, None])[:, 0], 0)
        left = left - before
        digit = (1 << _DIGIT) - 1 - digit
        heads = digit if heads is None else (heads << _DIGIT) + digit
        place += _DIGIT
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    return heads.to(integers).view(dtype)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _table(pieces: Callable[[], Iterator[Tensor]], heads: Tensor | None, place: int) -> tuple[Tensor, torch.dtype]:
    """Count, for each model, how many numbers that begin with ``heads`` have which digit next."""
    table, dtype = None, torch.float32
    for piece in pieces():
        dtype = piece.dtype
        if table is None:
            table = torch.zeros(len(piece), 1 << _DIGIT, dtype=torch.int64)
        rest = _bits(dtype) - place - _DIGIT
        for row, numbers in enumerate(piece.contiguous().view(torch.int32 if _bits(dtype) == 32 else torch.int64)):
            digits = numbers >> rest
            if heads is not None:
                digits = digits[digits >> _DIGIT == heads[row]] & ((1 << _DIGIT) - 1)
            table[row] += torch.bincount(digits, minlength=1 << _DIGIT)
    assert table is not None, "there is a number"
    return table, dtype

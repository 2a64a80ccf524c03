"""How the n largest of m are found: kernels over integer keys of shape (groups, m), all with the same tie rule.

The absolute value of a float, read as an integer, keeps its order, so ``keys`` are exact and NaN is the largest. An
entry is beaten by a larger key, or by an equal key at a later index. Eager kernels are chosen for few passes over memory
and for operations that ATen vectorises; the traced kernel is written for one fused loop.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LITTLE_ENDIAN = sys.byteorder == "little"  # masks are assembled as one machine word per group: byte i is entry i
_COUNT_LIMIT = 12  # counting does m(m-1)/2 comparisons a group; beyond this selecting the threshold is faster (measured)
_INSERTION_LIMIT = 8  # the threshold by n passes of maximum and minimum; well ahead of kthvalue (measured)
_TRACED_COUNT_LIMIT = 16  # the traced kernels are unrolled: compile time grows with their m(m-1)/2 comparisons ...
_TRACED_BEST_LIMIT = 64  # ... or their m comparisons


def magnitude_keys(groups: Tensor) -> Tensor:
    """Integers, as wide as the floats, that order like their absolute values."""
    dtype = _INT[groups.element_size()]
    return groups.view(dtype) & torch.iinfo(dtype).max


def eager_kernel(keys: Tensor, n: int) -> Tensor:
    """Mask (groups, m) of the n winners of each row, by the quickest eager way for this n and m."""
    m = keys.shape[1]
    if _LITTLE_ENDIAN and n in (1, m - 1) and m & (m - 1) == 0:
        return _tournament(keys, losers=n != 1)
    if _LITTLE_ENDIAN and (n, m) == (2, 4):
        return _two_of_four(keys)
    return _count_ranks(keys, n) if m <= _COUNT_LIMIT else _threshold(keys, n)


def traced_kernel(keys: Tensor, n: int) -> Tensor:
    """Mask (groups, m) of the n winners of each row, as operations that a compiler fuses into one loop."""
    m = keys.shape[1]
    if n in (1, m - 1) and m <= _TRACED_BEST_LIMIT:
        return _traced_best(keys, losers=n != 1)
    return _traced_count(keys, n) if m <= _TRACED_COUNT_LIMIT else _stable_sort(keys, n)


def _tournament(keys: Tensor, *, losers: bool) -> Tensor:
    """The best of each row (``losers``: all but the worst) by log2(m) knock-out rounds between neighbours."""
    m = keys.shape[1]
    best = torch.minimum if losers else torch.maximum
    word = keys
    half = 1  # entries on each side of a match
    while half < m:
        pair = keys.view(-1, 2)
        left, right = pair[:, 0], pair[:, 1]
        to_right = right < left if losers else right >= left
        if 2 * half < m:
            keys = best(left, right)
        if half == 1:
            word = to_right.to(torch.int16).mul_(255).add_(1)  # bytes (1, 0) or (0, 1)
        elif half <= 4:
            side = to_right.to(_INT[2 * half]).neg_().bitwise_xor_((1 << 8 * half) - 1)
            word = word.view(side.dtype).bitwise_and_(side)
        else:
            sides = to_right.to(torch.int64).neg_()[:, None]
            word = word.view(-1, 2, half // 8)
            word[:, 1] &= sides
            word[:, 0] &= sides.bitwise_not_()
        half *= 2
    mask = word.view(-1).view(torch.uint8)
    if losers:
        mask ^= 1
    return mask.view(torch.bool).view(-1, m)


def _two_of_four(keys: Tensor) -> Tensor:
    """2:4: order both pairs, then compare the loser of each with the winner of the other."""
    pair = keys.view(-1, 2)
    left, right = pair[:, 0], pair[:, 1]
    to_right = right >= left
    high = torch.maximum(left, right).view(-1, 2)
    low = torch.minimum(left, right).view(-1, 2)
    both_left = (low[:, 0] > high[:, 1]).to(torch.int32)
    both_right = (low[:, 1] >= high[:, 0]).to(torch.int32)
    word = to_right.to(torch.int16).mul_(255).add_(1).view(torch.int32)
    word &= both_left + both_right - 1  # all ones where each pair sends its winner, else cleared
    word |= both_left.mul_(0x0000_0101)
    word |= both_right.mul_(0x0101_0000)
    return word.view(torch.bool).view(-1, 4)


def _count_ranks(keys: Tensor, n: int) -> Tensor:
    """Any n of a small m: count for each entry how many others of its group beat it."""
    groups, m = keys.shape
    rank = torch.arange(m, dtype=torch.uint8, device=keys.device)[:, None].repeat(1, groups)
    for i in range(m - 1):
        for j in range(i + 1, m):
            later_wins = (keys[:, j] >= keys[:, i]).view(torch.uint8)
            rank[i] += later_wins
            rank[j] -= later_wins
    return rank.lt_(n).view(torch.bool).t().contiguous()


def _threshold(keys: Tensor, n: int) -> Tensor:
    """Any n of a large m: keep what reaches the n-th largest, then repair the groups with ties at it."""
    m = keys.shape[1]
    if n <= _INSERTION_LIMIT:
        columns = keys.t().contiguous()
        mask = (columns >= _nth_largest(columns, n)).t().contiguous()
    else:
        mask = keys >= keys.kthvalue(m - n + 1, dim=1, keepdim=True).values
    if int(mask.count_nonzero()) != n * keys.shape[0]:
        tied = (mask.sum(1) != n).nonzero().squeeze(1)
        mask[tied] = _stable_sort(keys[tied], n)
    return mask


def _nth_largest(columns: Tensor, n: int) -> Tensor:
    """The n-th largest over the first dimension, by inserting one row after the other into the n largest so far."""
    top: list[Tensor] = []
    for value in columns:
        for place, held in enumerate(top):
            top[place], value = torch.maximum(held, value), torch.minimum(held, value)
        if len(top) < n:
            top.append(value)
    return top[-1]


def _stable_sort(keys: Tensor, n: int) -> Tensor:
    """The definition: a stable ascending sort prunes the first m - n, so among equals the later ones stay."""
    pruned = keys.argsort(dim=1, stable=True)[:, : keys.shape[1] - n]
    return torch.ones_like(keys, dtype=torch.bool).scatter(1, pruned, False)


def _traced_best(keys: Tensor, *, losers: bool) -> Tensor:
    m = keys.shape[1]
    columns = keys.unbind(1)
    best, index = columns[0], torch.zeros_like(columns[0])
    for i, column in enumerate(columns[1:], 1):
        wins = column < best if losers else column >= best
        index = torch.where(wins, i, index)
        best = torch.minimum(best, column) if losers else torch.maximum(best, column)
    if _LITTLE_ENDIAN and m % 4 == 0:
        width = 8 if m % 8 == 0 else 4
        word = _INT[width]
        ones = sum(1 << 8 * i for i in range(width)) if losers else 0
        byte = (1 << (index % width * 8).to(torch.int64)).to(word)
        words = [torch.where(index // width == q, byte, 0) ^ ones for q in range(m // width)]
        packed = words[0] if m == width else torch.stack(words, dim=1)
        return packed.view(torch.bool).view(-1, m)
    entries = torch.arange(m, dtype=keys.dtype, device=keys.device)
    return (entries != index[:, None]) if losers else (entries == index[:, None])


def _traced_count(keys: Tensor, n: int) -> Tensor:
    m = keys.shape[1]
    columns = keys.unbind(1)
    if _LITTLE_ENDIAN and m % 4 == 0:
        return _traced_count_words(columns, n)
    sign = 8 * keys.element_size() - 1
    ranks = [torch.zeros_like(columns[0]) + i for i in range(m)]
    for i in range(m - 1):
        for j in range(i + 1, m):
            later_wins = ((columns[i] - columns[j] - 1) >> sign) & 1
            ranks[i] = ranks[i] + later_wins
            ranks[j] = ranks[j] - later_wins
    return torch.stack([rank < n for rank in ranks], dim=1)


def _traced_count_words(columns: tuple[Tensor, ...], n: int) -> Tensor:
    """Four ranks per 32-bit word, offset by 128 - n so that a byte's top bit means "pruned"."""
    m = len(columns)
    sign = 8 * columns[0].element_size() - 1
    ones = 0x01010101

    def signed(word: int) -> int:
        return word - (1 << 32) if word >> 31 else word

    words: list[Tensor] = []
    for first in range(0, m, 4):
        start = signed(sum((128 - n + first + byte) << 8 * byte for byte in range(4)))
        words.append(torch.zeros_like(columns[0], dtype=torch.int32) + start)
    for i in range(m - 1):
        for j in range(i + 1, m):
            later_wins = ((columns[i] - columns[j] - 1) >> sign).to(torch.int32)  # all ones, or zero
            up, down = 1 << 8 * (i % 4), 1 << 8 * (j % 4)
            if i // 4 == j // 4:
                words[i // 4] = words[i // 4] + (later_wins & (up - down))
            else:
                words[i // 4] = words[i // 4] + (later_wins & up)
                words[j // 4] = words[j // 4] - (later_wins & down)
    kept = [((word >> 7) & ones) ^ ones for word in words]
    packed = kept[0] if m == 4 else torch.stack(kept, dim=1)
    return packed.view(torch.bool).view(-1, m)

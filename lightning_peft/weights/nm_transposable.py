"""N:M masks that hold along both sides of a matrix, so that the backward pass multiplies with an N:M matrix too."""

from __future__ import annotations

import functools
import itertools

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.weights.nm import nm_mask
from lightning_peft.weights.nm_pattern import check_pattern

_EXACT = 4  # up to this M all patterns of a block are compared: 90 at 2:4, 24 at 1:4 and 3:4
_CHUNK = 2**18  # blocks times patterns compared together


def transposable_nm_mask(weight: Tensor, n: int, m: int, dim: int = -1, across: int = 0) -> Tensor:
    """Mask that keeps at most N of every M entries along two dimensions at once, with the largest magnitudes.

    The weight is cut into blocks of M by M entries over the two dimensions. Up to M = 4 the best of all patterns of a block
    with N entries in every row and column is taken: 90 patterns at 2:4. Above, entries are pruned from the smallest on as long
    as their row or column still lacks one that is pruned (the 2-approximation of Hubara et al., NeurIPS 2021, algorithm 1), so
    a row or column may keep fewer than N. NaN counts as the largest magnitude. What lies in no whole block along ``across`` is
    N:M along ``dim`` alone, and what lies in no whole group along ``dim`` stays dense, as with
    :func:`~lightning_peft.weights.nm.nm_mask`.

    Args:
        weight: Floating point, at least two dimensions.
        n: Entries kept per group.
        m: Group size.
        dim: Dimension of the inputs, along which the forward pass sums.
        across: Dimension of the outputs, along which the backward pass sums.

    Returns:
        Boolean tensor of the weight's shape, ``True`` where the entry is kept.

    Raises:
        MisconfigurationException: On an impossible pattern, or when both dimensions are one.

    Example:
        >>> weight = torch.tensor([[9.0, 8, 1, 1], [9, 8, 1, 1], [9, 8, 2, 2], [1, 1, 2, 2]])
        >>> transposable_nm_mask(weight, 2, 4).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    check_pattern(n, m)
    if weight.ndim < 2 or dim % weight.ndim == across % weight.ndim:
        raise MisconfigurationException(
            f"A mask along both sides needs two dimensions, got dim={dim} and across={across} of shape {tuple(weight.shape)}. "
            "Use nm_mask for one."
        )
    weight = weight.detach()
    mask = nm_mask(weight, n, m, dim)
    rows, columns = weight.shape[across] // m, weight.shape[dim] // m
    if n == m or not rows * columns * weight.numel() or weight.is_meta:
        return mask
    whole = weight.movedim((across, dim), (-2, -1))[..., : rows * m, : columns * m]
    blocks = whole.unflatten(-1, (columns, m)).unflatten(-3, (rows, m)).transpose(-3, -2)  # type: ignore[no-untyped-call]
    magnitudes = _finite(blocks.reshape(-1, m * m).abs())
    chosen = _best_pattern(magnitudes, n, m) if m <= _EXACT else _pruned_from_the_smallest(magnitudes, n, m)
    kept = chosen.view(blocks.shape).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    mask.movedim((across, dim), (-2, -1))[..., : rows * m, : columns * m] = kept
    return mask


def _finite(magnitudes: Tensor) -> Tensor:
    """Single or double precision, NaN and infinity as large numbers whose sums are finite."""
    magnitudes = magnitudes if magnitudes.dtype == torch.float64 else magnitudes.float()
    most = torch.finfo(magnitudes.dtype).max / 1024
    return magnitudes.nan_to_num(nan=most, posinf=most).clamp(max=most)


@functools.cache
def patterns_of_block(n: int, m: int) -> Tensor:
    """All masks of a block with ``n`` entries in every row and column, shape ``(patterns, m * m)``, float.

    Example:
        >>> [len(patterns_of_block(n, 4)) for n in (1, 2, 3)]
        [24, 90, 24]
    """
    rows = list(itertools.combinations(range(m), n))
    found = []
    for choice in itertools.product(rows, repeat=m):
        counts = [sum(column in row for row in choice) for column in range(m)]
        if counts == [n] * m:
            found.append([float(column in row) for row in choice for column in range(m)])
    return torch.tensor(found)


def _best_pattern(magnitudes: Tensor, n: int, m: int) -> Tensor:
    patterns = patterns_of_block(n, m).to(magnitudes)
    best = [(part @ patterns.T).argmax(1) for part in torch.split(magnitudes, max(1, _CHUNK // len(patterns)))]
    return patterns.bool()[torch.cat(best)]


def _pruned_from_the_smallest(magnitudes: Tensor, n: int, m: int) -> Tensor:
    blocks = torch.arange(len(magnitudes), device=magnitudes.device)
    kept = torch.ones_like(magnitudes, dtype=torch.bool)
    lacking = [torch.full((len(magnitudes), m), m - n, device=magnitudes.device) for _ in range(2)]  # of rows, of columns
    for place in magnitudes.argsort(dim=1, stable=True).unbind(1):
        sides = place // m, place % m
        open_ = torch.stack([side[blocks, at] > 0 for side, at in zip(lacking, sides, strict=True)]).any(0)
        kept[blocks, place] = ~open_
        for side, at in zip(lacking, sides, strict=True):
            side[blocks, at] -= open_.int()
    return kept

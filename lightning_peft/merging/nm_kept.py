"""N:M patterns that all models share, and that the merged one keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_peft.weights.nm import is_nm, nm_mask
from lightning_peft.weights.nm_layout import group_view

_SIZES = (2, 4, 8, 16)
_LOOK = 4096  # entries that tell a dense tensor


class Pattern(NamedTuple):
    """At most ``n`` of ``m`` entries along ``dim`` are not zero."""

    n: int
    m: int
    dim: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def shared_pattern(tensors: Sequence[Tensor]) -> Pattern | None:
    """Return the N:M pattern, up to half of each group, that all tensors have; ``None`` where there is none.

    Args:
        tensors: One tensor of every model.

    Example:
        >>> import torch
        >>> shared_pattern([torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([[3.0, 4.0, 0.0, 0.0]])])
        Pattern(n=2, m=4, dim=1)
    """
    first = tensors[0]
    if first.dim() < 2 or 2 * int(first.reshape(-1)[:_LOOK].count_nonzero()) > min(_LOOK, first.numel()):
        return None
    for dim in (1, 0):  # along inputs: rows of a Linear and channels of a convolution, columns of a Conv1D of transformers
        for m in _SIZES:
            if first.shape[dim] >= m:
                n = max(int(group_view(tensor, m, dim).count_nonzero(-1).max()) for tensor in tensors)
                if 0 < n <= m // 2:
                    return Pattern(n, m, dim)
    return None


def keep_(merged: Tensor, pattern: Pattern) -> float:
    """Give a merged tensor the pattern that its models have, in place: the largest entries of each group stay.

    Returns:
        Share of its sum of squares that went; 0 where it had the pattern already, since its models' masks agree.
    """
    if is_nm(merged, *pattern):
        return 0.0
    before = float(merged.double().square().sum())
    merged.mul_(nm_mask(merged, *pattern))
    return 1 - float(merged.double().square().sum()) / before

"""Lengths of the rows of a product of thin matrices."""

from __future__ import annotations

from torch import Tensor


def row_norms(down: Tensor, up: Tensor) -> Tensor:
    """Norms of the rows of ``B A``, which is not made.

    Args:
        down: ``A``, shape ``(..., rank, inputs)``.
        up: ``B``, shape ``(..., outputs, rank)``.

    Returns:
        Shape ``(..., outputs)``.

    Example:
        >>> import torch
        >>> row_norms(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]))
        tensor([10.,  0.])
    """
    return (up @ (down @ down.mT) * up).sum(-1).clamp_min(0).sqrt()

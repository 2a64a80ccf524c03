"""Weights of models as shares of their sum."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.merging.errors import MergeError


def shares(weights: Tensor) -> Tensor:
    """Divide weights by their sum.

    Args:
        weights: ``(n,)``.

    Raises:
        MergeError: They add up to zero.

    Example:
        >>> import torch
        >>> shares(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    total = weights.sum()
    if abs(float(total)) < 1e-12:
        raise MergeError(f"weights={weights.tolist()} add up to zero, so they have no mean. Give others.")
    return weights / total

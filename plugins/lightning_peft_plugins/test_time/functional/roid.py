"""The mathematics of ROID: a loss that does not fade for sure predictions, and a corrected prior."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_likelihood_ratio(logits: Tensor, clip: float = 0.99) -> Tensor:
    """Negative soft log-likelihood ratio, ``-sum p log(p / (1 - p))`` with probabilities clipped (ROID, eq. 4).

    Args:
        logits: Shape ``(batch, classes)``.
        clip: Largest probability.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> soft_likelihood_ratio(torch.tensor([[0.0, 0.0]])).abs() < 1e-4
        tensor([True])
    """
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).clamp(max=clip)
    return -(p * (p / (1 - p) + 1e-5).log()).sum(-1)


def prior_corrected(logits: Tensor) -> Tensor:
    """Logits times the smoothed mean prediction of the batch, as the official code corrects for shifted labels.

    Args:
        logits: Shape ``(batch, classes)``.

    Returns:
        Same shape.

    Example:
        >>> prior_corrected(torch.tensor([[2.0, 0.0]])).round(decimals=3)
        tensor([[1.2330, 0.0000]])
    """
    prior = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(0)
    smooth = max(1 / logits.shape[0], 1 / logits.shape[1]) / prior.max()
    return (logits * (prior + smooth) / (1 + smooth * logits.shape[1])).to(logits.dtype)

"""The mathematics of PS-KD as pure functions (Kim et al., ICCV 2021, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def pskd_alpha(epoch: int, epochs: int, alpha: float) -> float:
    """Weight of the past prediction in an epoch: ``alpha_T * (e + 1) / T``, the official code's linear growth.

    Args:
        epoch: Epoch, from 0.
        epochs: Total number of epochs ``T``; the weight stays at ``alpha`` in any epoch beyond.
        alpha: Final weight ``alpha_T``, in [0, 1].

    Returns:
        The weight, in [0, 1].

    Example:
        >>> [round(pskd_alpha(epoch, 300, 0.8), 6) for epoch in (0, 149, 299)]
        [0.002667, 0.4, 0.8]
    """
    return alpha * min(1.0, (epoch + 1) / epochs)


def soften_targets(target: Tensor, previous: Tensor, alpha: float) -> Tensor:
    """Mix a target distribution with a past prediction: ``(1 - alpha) * target + alpha * previous``.

    Args:
        target: One-hot or smoothed targets, shape ``(batch, classes)``.
        previous: Class probabilities predicted earlier for the same samples, shape ``(batch, classes)``.
        alpha: Weight of the past prediction.

    Returns:
        Soft targets, shape ``(batch, classes)``.

    Example:
        >>> soften_targets(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.3, 0.2]]), 0.4)
        tensor([[0.2000, 0.7200, 0.0800]])
    """
    return (1 - alpha) * target + alpha * previous


def soft_cross_entropy(
    log_probabilities: Tensor, target: Tensor, reduction: Literal["mean", "sum"] = "mean", weight: float = 1.0
) -> Tensor:
    """Cross entropy with a distribution as target: ``-sum_c target_c * log p_c`` of each sample.

    Args:
        log_probabilities: Log-softmax of the logits, shape ``(batch, classes)``. A class that is ruled out (``-inf``) counts
            nothing where its target is 0.
        target: Target distribution, same shape. A row of zeros makes its sample count nothing in the sum and still count as one
            in the mean.
        reduction: ``"mean"`` over the batch or ``"sum"``.
        weight: Factor of the result.

    Returns:
        A scalar.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]])
        >>> soft_cross_entropy(logits.log_softmax(-1), torch.tensor([[0.2, 0.72, 0.08]]))
        tensor(1.8395)
    """
    # All factors go into the target, which has no graph: every one behind the sum would be a step of the backward pass.
    factor = weight / max(1, target.shape[0]) if reduction == "mean" else weight
    shares = target.to(log_probabilities.dtype) * -factor
    return torch.where(shares == 0, 0.0, shares * log_probabilities).sum()

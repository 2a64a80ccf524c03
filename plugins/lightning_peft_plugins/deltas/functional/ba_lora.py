"""The three terms of BA-LoRA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, mse_loss, normalize


def consistency(logits: Tensor, reference: Tensor) -> Tensor:
    """Distance of predictions from those of the network before (Chang et al., BA-LoRA, 2024).

    Args:
        logits: Shape ``(batch, classes)`` or ``(batch, tokens, classes)``.
        reference: Logits of the network before, the same shape.

    Returns:
        For classes, the mean squared difference of the logits, scaled to length one; for tokens, the divergence
        ``KL(reference, logits)`` in nats, added up over tokens and averaged over the batch.

    Example:
        >>> consistency(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(1.)
    """
    if logits.ndim == 2:
        return mse_loss(normalize(logits, dim=-1), normalize(reference, dim=-1))
    return kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)


def sameness(logits: Tensor) -> Tensor:
    """What BA-LoRA's diversity term lowers: covariance between classes, or the lack of entropy of tokens.

    Args:
        logits: Shape ``(batch, classes)`` or ``(batch, tokens, classes)``.

    Returns:
        For classes, the squared covariances of two different classes over the batch, added up and divided by the number of
        classes; zero for a batch of one. For tokens, the negative entropy in nats, averaged.

    Example:
        >>> sameness(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        tensor(4.)
    """
    if logits.ndim == 2:
        centred = logits - logits.mean(0)
        covariance = centred.T @ centred / max(len(logits) - 1, 1)
        return (covariance - covariance.diagonal().diag()).square().sum() / logits.shape[1]
    logs = logits.log_softmax(-1)
    return (logs.exp() * logs).sum(-1).mean()


def leading_share(logits: Tensor, count: int) -> Tensor:
    """Share of the largest singular values in the sum of all, of the matrix of a batch's logits.

    Args:
        logits: Shape ``(batch, ...)``.
        count: Values that are the largest.

    Example:
        >>> leading_share(torch.diag(torch.tensor([3.0, 1.0])), 1)
        tensor(0.7500)
    """
    values = torch.linalg.svdvals(logits.flatten(1))
    return values[:count].sum() / values.sum().clamp_min(1e-10)

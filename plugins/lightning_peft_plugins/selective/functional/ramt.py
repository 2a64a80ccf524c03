"""The mathematics of R-AMT as pure functions: tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div

_LEAST = 1e-8  # of the divisor: where both gradients are zero, nothing depends on the share


def kept_share(gradient: Tensor, other: Tensor) -> Tensor:
    """Probability with which each entry of a gradient is kept beside another one (gradient dropout, Zheng et al. 2023).

    One where both have the same sign, less the more the other one objects.

    Args:
        gradient: Gradient of the task's loss.
        other: Gradient of the distance from what the frozen network answers, of the same shape.

    Example:
        >>> import torch
        >>> kept_share(torch.tensor([1.0, -1.0, 1.0, 3.0]), torch.tensor([2.0, -1.0, -1.0, -1.0]))
        tensor([1.0000, 1.0000, 0.5000, 0.7500])
    """
    agreed = gradient.sign() * (gradient + other) / (gradient.abs() + other.abs() + _LEAST)
    return (1 + agreed) / 2


def distance_from_answers(logits: Tensor, answers: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of predictions from earlier ones, times the squared temperature, averaged over samples.

    Args:
        logits: Shape ``(..., classes)``.
        answers: Logits of the frozen network, same shape.
        temperature: What both are divided by.

    Returns:
        A scalar, in nats.

    Example:
        >>> import torch
        >>> distance_from_answers(torch.zeros(1, 2), torch.tensor([[0.0, float("-inf")]]))
        tensor(0.6931)
    """
    now, before = ((each / temperature).log_softmax(-1).flatten(0, -2) for each in (logits, answers.to(logits)))
    return temperature**2 * kl_div(now, before.exp(), reduction="batchmean")

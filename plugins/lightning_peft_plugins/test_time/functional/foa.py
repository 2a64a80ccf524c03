"""The mathematics of FOA: how fit a prompt is, by what the network makes of a batch with it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft_plugins.test_time.functional.predictions import softmax_entropy

BATCH = 64
"""Samples in a batch of the official code, for which the weight of the discrepancy is given."""


def prompt_fitness(logits: Tensor, features: Tensor, mean: Tensor, deviation: Tensor, strength: float = 0.4) -> Tensor:
    """Entropy of a batch plus the discrepancy of its features from the source's; less is fitter (FOA, Niu et al., ICML 2024).

    The discrepancy is the squared difference of means and of standard deviations, summed over all features, times the batch
    size over 64, as in the official code.

    Args:
        logits: Shape ``(samples, classes)``.
        features: Of the class token after each block, shape ``(samples, width)``; at least two samples.
        mean: Of the source's features, shape ``(width,)``.
        deviation: Their standard deviation (unbiased), shape ``(width,)``.
        strength: Weight of the discrepancy.

    Returns:
        A scalar.

    Example:
        >>> features = torch.tensor([[0.0], [2.0]])
        >>> prompt_fitness(torch.zeros(2, 2), features, torch.tensor([1.0]), torch.tensor([2.0]), 16.0)
        tensor(1.5579)
    """
    own_deviation, own_mean = torch.std_mean(features, dim=0)
    discrepancy = (own_deviation - deviation).square().sum() + (own_mean - mean).square().sum()
    return softmax_entropy(logits).sum() + strength * discrepancy * len(logits) / BATCH

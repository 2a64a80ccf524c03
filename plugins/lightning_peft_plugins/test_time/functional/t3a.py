"""The mathematics of T3A: which features represent a class, and predictions by similarity to them."""

from __future__ import annotations

import torch
from torch import Tensor


def select_supports(entropy: Tensor, labels: Tensor, per_class: int | None) -> Tensor:
    """Choose the surest features of each class.

    Args:
        entropy: Entropy of the prediction for each feature, in nats, shape ``(features,)``.
        labels: Predicted class of each feature, shape ``(features,)``.
        per_class: How many of a class are kept; ``None`` for all.

    Returns:
        Indices, class by class, the surest first; shape ``(kept,)``.

    Example:
        >>> select_supports(torch.tensor([0.3, 0.1, 0.2, 0.0]), torch.tensor([1, 0, 1, 1]), 2)
        tensor([1, 3, 2])
    """
    surest = entropy.argsort(stable=True)
    order = surest[labels[surest].argsort(stable=True)]
    if per_class is None:
        return order
    counts = torch.bincount(labels)
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[labels[order]]
    return order[place < per_class]


def class_templates(supports: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Direction of the sum of a class's features, each of length 1 (T3A, Iwasawa and Matsuo, NeurIPS 2021).

    Args:
        supports: Shape ``(features, width)``.
        labels: Class of each, shape ``(features,)``.
        classes: Number of classes.

    Returns:
        Shape ``(classes, width)``; rows of length 1, of zeros for a class without a feature.

    Example:
        >>> class_templates(torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 0.0]]), torch.tensor([0, 0, 1]), 3)
        tensor([[0.7071, 0.7071],
                [1.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    directions = torch.nn.functional.normalize(supports, dim=1)
    members = torch.nn.functional.one_hot(labels, classes).to(directions.dtype)
    return torch.nn.functional.normalize(members.T @ directions, dim=1)

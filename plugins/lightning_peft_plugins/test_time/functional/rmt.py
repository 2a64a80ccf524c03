"""The mathematics of RMT: the source's prototypes, and a loss that draws features and their views to the nearest."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_prototypes(features: Tensor, prototypes: Tensor) -> Tensor:
    """Which prototype each feature is nearest to, by the cosine.

    Args:
        features: Shape ``(samples, width)``.
        prototypes: Shape ``(classes, width)``.

    Returns:
        Class indices, shape ``(samples,)``.

    Example:
        >>> nearest_prototypes(torch.tensor([[1.0, 0.1], [-2.0, 3.0]]), torch.eye(2))
        tensor([0, 1])
    """
    normalize = torch.nn.functional.normalize
    return (normalize(features, dim=1, eps=1e-8) @ normalize(prototypes, dim=1, eps=1e-8).T).argmax(1)


def contrast_of_groups(groups: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss of groups, each a class of its own (RMT, Döbler et al., CVPR 2023).

    Every member is drawn to the others of its group and pushed from those of all other groups.

    Args:
        groups: Projected features, shape ``(groups, members, width)``; normalised to length 1 here. In RMT a group is a sample:
            its nearest prototype, its features, and those of a view of it.
        temperature: Of the similarities.

    Returns:
        A scalar, differentiable.

    Example:
        >>> x = torch.eye(2)[:, None].expand(2, 3, 2)
        >>> round(float(contrast_of_groups(x, 1.0)), 4)
        1.1326
    """
    count, members, _ = groups.shape
    features = torch.nn.functional.normalize(groups.flatten(0, 1), dim=1)
    similarity = features @ features.T / temperature
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    group = torch.arange(count, device=features.device).repeat_interleave(members)
    partners = (group[:, None] == group[None]) & ~itself
    return -torch.where(partners, log_p, 0.0).sum(1).div(members - 1).mean()

"""The mathematics of LAME: predictions of a batch that agree with those of their neighbours."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Affinity: TypeAlias = Literal["knn", "rbf", "linear"]


def affinity_matrix(features: Tensor, kind: Affinity = "knn", neighbours: int = 5) -> Tensor:
    """How much each sample of a batch belongs together with every other.

    Args:
        features: Shape ``(samples, width)``; normalised to length 1 here.
        kind: ``"knn"``: 1 for the nearest neighbours, else 0; ``"rbf"``: Gaussian, as wide as the mean distance to the
            neighbour of that number; ``"linear"``: cosine.
        neighbours: Number of neighbours.

    Returns:
        Shape ``(samples, samples)``; not symmetric for ``"knn"``.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> affinity_matrix(x, "knn", 1).argmax(1)
        tensor([1, 0, 3, 2])
    """
    x = torch.nn.functional.normalize(features.flatten(1), dim=-1)
    if kind == "linear":
        return x @ x.T
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    if kind == "rbf":
        width = distance.topk(min(neighbours, len(x)), dim=-1, largest=False).values[:, -1].mean().clamp(min=1e-12)
        return (-(distance**2) / (2 * width**2)).exp()
    nearest = distance.topk(min(neighbours + 1, len(x)), dim=-1, largest=False).indices[:, 1:]
    return torch.zeros_like(distance).scatter_(-1, nearest, 1.0)


def laplacian_adjust(log_p: Tensor, affinity: Tensor, steps: int = 100, tolerance: float = 1e-8) -> Tensor:
    """Adjust predictions so that samples which belong together are predicted alike (Boudiaf et al., CVPR 2022, eq. 5).

    Fixed point of ``y = softmax(log p + W y)``, iterated until the energy stands still.

    Args:
        log_p: Log-probabilities, shape ``(samples, classes)``.
        affinity: ``W``, shape ``(samples, samples)``.
        steps: Most iterations.
        tolerance: Relative change of the energy that counts as standing still.

    Returns:
        Log of the adjusted probabilities, shape ``(samples, classes)``.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.45, 0.55]])
        >>> laplacian_adjust(p.log(), torch.tensor([[0.0, 1.0], [1.0, 0.0]])).argmax(1)
        tensor([0, 0])
    """
    log_y, energy = log_p, float("inf")
    for step in range(steps):
        pairwise = affinity @ log_y.exp()
        log_y = (log_p + pairwise).log_softmax(-1)
        y = log_y.exp()
        before, energy = energy, float((y * (log_y - log_p - pairwise)).sum())
        if step > 1 and abs(energy - before) <= tolerance * abs(before):
            break
    return log_y

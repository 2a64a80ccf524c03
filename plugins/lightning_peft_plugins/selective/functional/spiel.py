"""The mathematics of SpIEL as pure functions: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def reallocated(values: Tensor, indices: Tensor, candidates: Tensor, gradients: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Say which values are dropped, and which candidates take their places.

    The smallest values go, for the valid candidates with the largest gradients. A candidate is valid unless it is trained
    already and stays. One that would be dropped and grown at once stays as it is.

    Args:
        values: Shape ``(values,)``.
        indices: Their coordinates.
        candidates: Coordinates that could be trained instead, shape ``(candidates,)``.
        gradients: Gradient of each.
        count: How many values may go.

    Returns:
        Places in ``values``, and as many places in ``candidates``.

    Example:
        >>> values, indices = torch.tensor([0.1, 3.0, -0.2]), torch.tensor([0, 4, 8])
        >>> reallocated(values, indices, torch.tensor([4, 5, 6]), torch.tensor([9.0, 1.0, -2.0]), 1)
        (tensor([0]), tensor([2]))
    """
    outgoing = values.abs().topk(count, largest=False).indices
    staying = torch.ones(len(values), dtype=torch.bool, device=values.device)
    staying[outgoing] = False
    valid = (~torch.isin(candidates, indices[staying])).nonzero().flatten()
    incoming = valid[gradients[valid].abs().topk(min(count, len(valid))).indices]
    outgoing, incoming = (
        outgoing[~torch.isin(indices[outgoing], candidates[incoming])],
        incoming[~torch.isin(candidates[incoming], indices[outgoing])],
    )
    return outgoing[: len(incoming)], incoming


def seeded_moments(gradients: Tensor, squares: Tensor, samples: int, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Adam's moments for coordinates whose gradient was seen a few times, as if Adam had met the mean each time.

    Args:
        gradients: Sum of the gradients.
        squares: Sum of their squares.
        samples: How many were summed, which is the age of the coordinates.
        betas: Adam's.

    Returns:
        ``exp_avg`` and ``exp_avg_sq``, whose bias correction at this age gives the means.

    Example:
        >>> first, second = seeded_moments(torch.tensor([6.0]), torch.tensor([20.0]), 2, (0.5, 0.75))
        >>> first / (1 - 0.5**2), second / (1 - 0.75**2)
        (tensor([3.]), tensor([10.]))
    """
    return gradients / samples * (1 - betas[0] ** samples), squares / samples * (1 - betas[1] ** samples)

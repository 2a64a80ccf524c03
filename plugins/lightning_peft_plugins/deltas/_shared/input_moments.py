"""Second moments of what a linear layer is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def moments(inputs: Any) -> Tensor:
    """Add up the outer products of all inputs, each with a one behind it.

    Args:
        inputs: Shape ``(..., features)``.

    Returns:
        Shape ``(features + 1, features + 1)``: second moments, with sums of the inputs in the last row and column, and their
        number in the corner; at least in single precision.

    Example:
        >>> moments(torch.tensor([[2.0], [3.0]]))
        tensor([[13.,  5.],
                [ 5.,  2.]])
    """
    rows = inputs.detach().flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows.T @ rows


def covariance(added: Tensor) -> Tensor:
    """Covariance of the inputs, shape ``(features, features)``, from their :func:`moments`.

    Example:
        >>> covariance(moments(torch.tensor([[2.0], [4.0]])))
        tensor([[1.]])
    """
    number, sums = added[-1, -1], added[:-1, -1]
    return added[:-1, :-1] / number - torch.outer(sums, sums) / number**2


def explained(covariance: Tensor) -> Tensor:
    """Share of the inputs' variance along each principal component, the largest first.

    Args:
        covariance: Their covariance, shape ``(features, features)``.

    Example:
        >>> explained(torch.diag(torch.tensor([1.0, 3.0])))
        tensor([0.7500, 0.2500])
    """
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)

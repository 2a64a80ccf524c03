"""Truncated singular value decompositions of weights, linear or convolutional."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scheme = Literal["channel", "spatial"]
SCHEMES: tuple[str, ...] = get_args(Scheme)


class Truncation(NamedTuple):
    """A truncated weight.

    Attributes:
        weight: The nearest weight of that rank; the weight itself when no singular value was dropped.
        pull: ``U V^T`` of what was kept, in the weight's shape: a sub-gradient of the nuclear norm (the sum of the singular
            values) of ``weight``, by which its own inner product with ``weight`` is that norm.
        rank: Singular values kept.
    """

    weight: Tensor
    pull: Tensor
    rank: int


def as_matrix(weight: Tensor, scheme: Scheme) -> Tensor:
    """Lay a weight out as the matrix whose rank counts.

    Args:
        weight: ``(outputs, inputs, ...)``, two to five dimensions.
        scheme: ``"channel"``: ``(outputs, inputs * kernel)``, a product of a convolution to ``rank`` channels and a pointwise
            one. ``"spatial"``: ``(inputs * height, outputs * width)``, a product of a column and a row of a kernel; of weights
            that are not of four dimensions the same as ``"channel"``.

    Example:
        >>> kernel = torch.zeros(8, 4, 3, 5)
        >>> as_matrix(kernel, "channel").shape, as_matrix(kernel, "spatial").shape
        (torch.Size([8, 60]), torch.Size([12, 40]))
    """
    if scheme == "spatial" and weight.ndim == 4:
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return weight.flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size, scheme: Scheme) -> Tensor:
    """Undo :func:`as_matrix`."""
    if scheme == "spatial" and len(shape) == 4:
        outputs, inputs, height, width = shape
        return matrix.view(inputs, height, outputs, width).permute(2, 0, 1, 3).contiguous()
    return matrix.view(shape)


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """Count the largest singular values whose squares make up a share of the sum of all squares, at least one.

    Args:
        singular_values: In descending order.
        energy: The share, in (0, 1]; 1 keeps all.

    Example:
        >>> sigma = torch.tensor([3.0, 1.0, 0.5, 0.1])
        >>> energy_rank(sigma, 0.9), energy_rank(sigma, 0.98), energy_rank(sigma, 1.0)
        (2, 3, 4)
    """
    if energy >= 1.0:
        return len(singular_values)
    sums = singular_values.double().square().cumsum(0)
    return min(int((sums < energy * sums[-1]).sum()) + 1, len(singular_values))


@torch.no_grad()
def truncate(weight: Tensor, energy: float, scheme: Scheme = "channel") -> Truncation | None:
    """Drop the smallest singular values of a weight (Xu et al., IJCAI 2020, arXiv 2004.14566).

    Args:
        weight: ``(outputs, inputs, ...)``; half precision is decomposed in single.
        energy: Share of the squared singular values to keep, see :func:`energy_rank`.
        scheme: See :func:`as_matrix`.

    Returns:
        The truncated weight; ``None`` when the decomposition does not converge or the weight is not finite.

    Example:
        >>> truncate(torch.diag(torch.tensor([3.0, 1.0, 0.5])), 0.9).weight.diag()
        tensor([3., 1., 0.])
    """
    matrix = as_matrix(weight.detach(), scheme)
    parts = decompose(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    if parts is None:
        return None
    u, sigma, v = parts
    rank = energy_rank(sigma, energy)
    u, v = u[:, :rank], v[:rank]
    pull = from_matrix((u @ v).to(weight.dtype), weight.shape, scheme)
    if rank == len(sigma):
        return Truncation(weight.detach(), pull, rank)
    return Truncation(from_matrix((u * sigma[:rank] @ v).to(weight.dtype), weight.shape, scheme), pull, rank)


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Thin decomposition ``U, sigma, V^T``, in double precision where single does not converge; ``None`` when both do not."""
    for dtype in (matrix.dtype, torch.float64):
        try:
            u, sigma, v = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if sigma.isfinite().all():
            return u.to(matrix.dtype), sigma.to(matrix.dtype), v.to(matrix.dtype)
    return None

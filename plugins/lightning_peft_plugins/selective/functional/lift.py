"""The mathematics of LIFT as pure functions: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_weights(weight: Tensor, count: int, rank: int) -> Tensor:
    """Find the entries that are largest in the nearest matrix of a low rank.

    Args:
        weight: A weight, its first dimension against all others.
        count: How many entries.
        rank: The low rank; from that of the weight on, the largest of its own entries are found.

    Returns:
        Their places in the flattened weight, ascending.

    Example:
        >>> principal_weights(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), 2, 2)
        tensor([0, 3])
        >>> principal_weights(torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 5.0]]), 1, 1) < 5
        tensor([True])
    """
    matrix = weight.detach().flatten(1)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if rank < min(matrix.shape):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return matrix.abs().flatten().topk(count, sorted=False).indices.sort().values

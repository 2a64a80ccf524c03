"""Where DSEE lets a weight gain single values."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def sparse_support(
    weight: Tensor, count: int, generator: Generator, rounds: int = 100, step: int = 5, threshold: float = 0.01
) -> Tensor:
    """Find the entries of a matrix that stand out from a matrix of low rank (GreBsmo, in Chen et al., DSEE, ACL 2023).

    The matrix is parted into a product of growing rank, a sparse rest of entries above ``threshold``, and noise. In each round
    both are fitted twice in turn, and the product gains the ``step`` directions that the noise has most of. It ends early where
    the rank would be above two thirds of the largest, for then little would be left to stand out.

    Args:
        weight: Shape ``(outputs, inputs)``.
        count: How many entries.
        generator: What the first direction is drawn from, on the CPU.
        rounds: Rounds at most.
        step: Directions gained in each.
        threshold: Below it an entry is noise, in the unit of the weight.

    Returns:
        Places of the entries in the flattened matrix that are largest beside the product, ascending.

    Example:
        >>> weight = torch.outer(torch.arange(1.0, 9.0), torch.ones(8))
        >>> weight[2, 3] += 5
        >>> sparse_support(weight, 1, torch.Generator().manual_seed(0), rounds=1)
        tensor([19])
    """
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    right = torch.randn(1, matrix.shape[1], generator=generator).to(matrix)
    most = 2 * min(matrix.shape) // 3
    rest = matrix
    for _ in range(rounds):
        sparse = torch.zeros_like(matrix)
        for _ in range(2):
            left = torch.linalg.qr((matrix - sparse) @ right.T).Q
            right = left.T @ (matrix - sparse)
            rest = matrix - left @ right
            sparse = torch.where(rest.abs() < threshold, 0.0, rest)
        if len(right) + step > most:
            break
        right = torch.cat([right, torch.linalg.qr(rest - sparse).R[:step]])
    return rest.abs().flatten().topk(count, sorted=False).indices.sort().values

"""The two terms of PEGO."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def preserve(weight: Tensor, down: Tensor, up: Tensor, members: int) -> Tensor:
    """How far the members of a group are from orthogonal to the frozen weight (Hu et al., PEGO, ECCV 2024).

    Args:
        weight: ``W``, shape ``(..., outputs, inputs)``.
        down: ``A`` of all members, one below the other, shape ``(..., members * rank, inputs)``.
        up: ``B`` of all members side by side, shape ``(..., outputs, members * rank)``.
        members: Number of members.

    Returns:
        The sum of ``|W (B_i A_i)^T|`` over members and elements, a scalar.

    Example:
        >>> preserve(2 * torch.eye(2), torch.tensor([[3.0, 0.0]]), torch.ones(2, 1), 1)
        tensor(12.)
    """
    whole = weight @ down.mT
    parts = zip(whole.chunk(members, -1), up.chunk(members, -1), strict=True)
    return torch.stack([(product @ b.mT).abs().sum() for product, b in parts]).sum()


def diversify(down: Tensor, up: Tensor, members: int) -> Tensor:
    """How far the members of a group are from orthogonal to each other.

    Args:
        down: ``A`` of all members, one below the other, shape ``(..., members * rank, inputs)``.
        up: ``B`` of all members side by side, shape ``(..., outputs, members * rank)``.
        members: Number of members.

    Returns:
        The sum of ``|B_i A_i (B_j A_j)^T|`` over pairs and elements, a scalar.

    Example:
        >>> diversify(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[1.0, 3.0]]), 2)
        tensor(6.)
    """
    group = list(zip(down.chunk(members, -2), up.chunk(members, -1), strict=True))
    found = [(b @ (a @ other.mT) @ beside.mT).abs().sum() for (a, b), (other, beside) in combinations(group, 2)]
    return torch.stack(found).sum() if found else down.new_zeros(())

"""How far factors are from orthonormal ones."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality(rows: Tensor) -> Tensor:
    """``|R R^T - I|`` by the Frobenius norm, added up over a stack.

    Args:
        rows: Shape ``(..., rank, size)``.

    Returns:
        A scalar; its gradient is finite where the rows are orthonormal.

    Example:
        >>> orthogonality(2 * torch.eye(2, 3))
        tensor(4.2426)
    """
    gap = rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return torch.linalg.matrix_norm(gap).sum()

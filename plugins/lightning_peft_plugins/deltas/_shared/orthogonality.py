"""How far factors are from orthonormal ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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


def factor_gaps(forms: Iterable[Any]) -> Tensor:
    """Add up :func:`orthogonality` of the rows of ``A`` and of the columns of ``B``, over low-rank forms."""
    return torch.stack([orthogonality(form.rows()) + orthogonality(form.up.mT) for form in forms]).sum()

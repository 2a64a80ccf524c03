"""The mathematics of SaRA as pure functions: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def nuclear_norm(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Sum of the singular values of a weight at some of its entries, zero elsewhere.

    Its gradient at an entry is that of ``U V^T``.

    Args:
        weight: Frozen weight, its first dimension against all others.
        indices: Places of the entries in the flattened weight.
        values: What the weight gains there.

    Returns:
        A scalar.

    Example:
        >>> weight = torch.tensor([[3.0, 9.0], [9.0, 3.0]])
        >>> nuclear_norm(weight, torch.tensor([0, 3]), torch.tensor([0.0, 1.0]))
        tensor(7.)
    """
    flat = weight.detach().flatten().to(torch.promote_types(weight.dtype, torch.float32))
    entries = flat[indices] + values.to(flat.dtype)
    matrix = torch.zeros_like(flat).index_add(0, indices, entries).view(weight.shape).flatten(1)
    norm: Tensor = torch.linalg.matrix_norm(matrix, ord="nuc")
    return norm

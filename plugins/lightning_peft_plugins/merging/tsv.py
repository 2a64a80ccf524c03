"""TSV-M: the leading singular vectors of all differences, made orthogonal to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft import merge_function


def orthogonal(vectors: Tensor) -> Tensor:
    """Return the nearest vectors that are orthonormal, or span as few directions as the given ones do.

    Args:
        vectors: ``(length, count)``.

    Returns:
        Likewise: the polar factor.

    Example:
        >>> orthogonal(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    real = values > values[0] * torch.finfo(values.dtype).eps * max(vectors.shape)
    return left[:, real] @ right[real]


@merge_function()
def tsv(deltas: Tensor, weights: Tensor) -> Tensor:
    """Merge task singular vectors (Gargiulo et al., CVPR 2025, https://arxiv.org/abs/2412.00081, section 4).

    Of each of ``n`` matrices the leading ``rank / n`` singular values stay, with their vectors, and what is left of that
    division goes to the largest that follow. Other tensors are averaged.

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        weights: ``(n,)``, what each is multiplied by.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> one, two = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))
        >>> tsv(torch.stack([one, two]), torch.ones(2))
        tensor([[3., 0.],
                [0., 2.]])
    """
    deltas = deltas * weights.to(deltas.dtype).view(-1, *[1] * (deltas.dim() - 1))
    if deltas.dim() != 3:
        return deltas.mean(0)
    share, left = divmod(min(deltas.shape[1:]), len(deltas))
    parts = [tuple(part[: share + 1].clone() for part in _vectors(delta)) for delta in deltas]
    rows, values, columns = (torch.stack(each) for each in zip(*parts, strict=True))
    kept = values > values.max() * torch.finfo(values.dtype).eps * max(deltas.shape)
    if left:
        following = values[:, share].sort(descending=True, stable=True).indices
        kept[following[left:], share] = False
    else:
        kept[:, share:] = False
    if not kept.any():
        return torch.zeros_like(deltas[0])
    return orthogonal(rows[kept].mT) * values[kept] @ orthogonal(columns[kept].mT).mT


def _vectors(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors of rows and of columns, one a line, with the values between them."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return left.mT, values, right

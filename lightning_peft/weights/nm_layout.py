"""How a dimension splits into N:M groups."""

from __future__ import annotations

from torch import Tensor


def remainder(size: int, m: int) -> int:
    """Entries at the end of a dimension that fill no whole group of ``m`` and so stay dense.

    Example:
        >>> remainder(10, 4)
        2
    """
    return size % m


def group_view(weight: Tensor, m: int, dim: int = -1) -> Tensor:
    """View the complete groups of ``m`` consecutive entries along ``dim``.

    Args:
        weight: Any tensor of at least one dimension.
        m: Group size.
        dim: Dimension along which the groups run.

    Returns:
        A view (never a copy) of shape ``(*other dims, weight.shape[dim] // m, m)``; an incomplete last group is left out.

    Example:
        >>> import torch
        >>> group_view(torch.arange(6).reshape(6, 1), 4, dim=0)
        tensor([[[0, 1, 2, 3]]])
    """
    moved = weight.movedim(dim, -1)
    size = moved.shape[-1]
    return moved.narrow(-1, 0, size - remainder(size, m)).view(*moved.shape[:-1], size // m, m)


def group_rows(weight: Tensor, m: int, dim: int = -1) -> Tensor:
    """Return the groups of :func:`group_view` as contiguous rows, shape ``(groups, m)``; a copy only where they are spread.

    Example:
        >>> import torch
        >>> group_rows(torch.arange(4).reshape(2, 2), 2, dim=0)
        tensor([[0, 2],
                [1, 3]])
    """
    if dim in (-1, weight.ndim - 1) and weight.is_contiguous() and remainder(weight.shape[-1], m) == 0:
        return weight.view(-1, m)
    return group_view(weight, m, dim).reshape(-1, m).contiguous()


def density(mask: Tensor) -> float:
    """Share of nonzero entries; 1.0 for an empty tensor.

    Example:
        >>> import torch
        >>> density(torch.tensor([True, False, False, True]))
        0.5
    """
    return int(mask.count_nonzero()) / mask.numel() if mask.numel() else 1.0

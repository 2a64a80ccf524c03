"""OPCM: differences added one after the other, each without what the sum so far already has."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.merging.errors import MergeError


def without(delta: Tensor, merged: Tensor, share: float) -> Tensor:
    """Project a difference off the singular directions of the sum so far.

    Args:
        delta: ``(rows, columns)``.
        merged: The sum, likewise.
        share: Of the singular values' sum. The leading directions that hold it lose their whole block, those after them their
            own entries.

    Returns:
        What is left of the difference, orthogonal to the sum.

    Example:
        >>> without(torch.ones(2, 2), torch.diag(torch.tensor([2.0, 1.0])), 0.5)
        tensor([[0., 1.],
                [1., 0.]])
    """
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    leading = int((values.cumsum(0) > share * values.sum()).int().argmax())
    within = left.mT @ delta @ right.mT
    # Directions of no size are any that complete the others: nothing says which of their entries would go.
    real = values > values[0] * torch.finfo(values.dtype).eps * max(delta.shape)
    lost = torch.diag(within.diagonal() * real)
    lost[:leading, :leading] = within[:leading, :leading]
    return delta - left @ lost @ right


def mean_norm(norms: Tensor, own: Tensor) -> Tensor:
    """Return what gives the merged difference the mean norm of the models' differences."""
    return torch.where(own > 0, norms.mean() / own, 1.0)


@merge_function(rescale=mean_norm)
def opcm(deltas: Tensor, *, share: float = 0.5) -> Tensor:
    """Merge models in the order in which they come (Tang et al., NeurIPS 2025, https://arxiv.org/abs/2501.09522, section 4).

    What each matrix adds is orthogonal to the sum of those before it; other tensors are added. The whole merged difference then
    gets the mean norm of the models'. The method rescales after every model. A projection does not depend on the scale of the
    sum, so once at the end is the same.

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        share: Share of the singular values' sum whose directions are kept clear, from 0 to below 1, ``alpha`` in the paper.

    Returns:
        The merged difference before it is rescaled, ``(*shape)``.

    Raises:
        MergeError: The share is none.

    Example:
        >>> opcm(torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]))
        tensor([[2., 1.],
                [1., 1.]])
    """
    if not 0 <= share < 1:
        raise MergeError(f"share={share!r} must be from 0 to below 1: the share of singular values that are kept clear.")
    merged = deltas[0].clone()
    for delta in deltas[1:]:
        merged += without(delta, merged, share) if merged.dim() == 2 else delta
    return merged

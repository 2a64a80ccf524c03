"""A weight decay of its own for what is pruned, so that it fades before it is cut off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.structure.optimizers import trained_by
from lightning_peft.weights.maps import MappedTensor
from lightning_peft_plugins.pruning.mask_map import MaskMap


def pruned_decay(weight: Tensor, kept: Tensor, strength: float) -> Tensor:
    """Gradient of ``strength / 2`` times the sum of the squared pruned weights.

    Added to the gradient of the loss it is the penalty of growing regularisation (Wang et al., ICLR 2021, arXiv 2012.09243,
    GReg-1).

    Args:
        weight: Stored weight.
        kept: Boolean, of the weight's shape, ``True`` = kept.
        strength: Penalty factor of this step.

    Returns:
        ``strength * weight`` where pruned, else zero.

    Example:
        >>> pruned_decay(torch.tensor([2.0, -4.0]), torch.tensor([True, False]), 0.5)
        tensor([ 0., -2.])
    """
    return torch.where(kept, 0.0, strength * weight)


def with_gradient(
    targets: Iterable[tuple[MappedTensor, MaskMap]], optimizer: Optimizer
) -> Iterator[tuple[MappedTensor, MaskMap, Tensor]]:
    """Yield the targets that an optimizer is about to move, with their gradients."""
    moved = trained_by(optimizer)
    for mapped, mask in targets:
        if mapped.stored in moved and mapped.stored.grad is not None:
            yield mapped, mask, mapped.stored.grad


@torch.no_grad()
def add_decay(targets: Iterable[tuple[MappedTensor, MaskMap]], optimizer: Optimizer, strength: float) -> None:
    """Add :func:`pruned_decay` to the gradients an optimizer is about to use."""
    for mapped, mask, grad in with_gradient(targets, optimizer):
        if mask.holds(mapped.stored):
            grad.add_(pruned_decay(mapped.stored, mask.held, strength))

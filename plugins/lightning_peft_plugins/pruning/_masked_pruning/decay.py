"""A weight decay of its own for what is pruned, so that it fades before it is cut off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.optim.optimizers import trained_by
from lightning_peft.weights.maps import MappedTensor
from lightning_peft_plugins.pruning._masked_pruning.mask_map import MaskMap
from lightning_peft_plugins.pruning.functional.decay import pruned_decay


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

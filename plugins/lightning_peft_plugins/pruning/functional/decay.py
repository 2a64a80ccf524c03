"""Decay of what is pruned."""

from __future__ import annotations

import torch
from torch import Tensor


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

"""WiSE-FT: from the base part of the way to the fine-tuned model."""

from __future__ import annotations

from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.arguments import not_negative
from lightning_peft_plugins.merging._shared.shares import shares


@merge_function(elementwise=True)
def interpolate(deltas: Tensor, weights: Tensor, *, share: float = 0.5) -> Tensor:
    """Go a share of the way from the base to a model, or to the mean of several (Wortsman et al., CVPR 2022).

    ``share=0`` is the base, ``share=1`` the fine-tuned model, beyond that an extrapolation; https://arxiv.org/abs/2109.01903,
    section 3.

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        weights: ``(n,)``; they need not add up to one.
        share: The share, ``alpha`` in the paper.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> import torch
        >>> interpolate(torch.tensor([[4.0]]), torch.ones(1), share=0.25)
        tensor([1.])
    """
    not_negative("share", share)
    return ((share * shares(weights)).to(deltas.dtype) @ deltas.flatten(1)).view(deltas.shape[1:])

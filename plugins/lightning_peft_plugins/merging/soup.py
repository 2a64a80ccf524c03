"""Uniform soup: the mean of models."""

from __future__ import annotations

from torch import Tensor

from lightning_peft import merge_function
from lightning_peft_plugins.merging._shared.shares import shares


@merge_function(elementwise=True)
def soup(models: Tensor, weights: Tensor) -> Tensor:
    """Average models (Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482, section 2).

    Args:
        models: Values, ``(n, *shape)``.
        weights: ``(n,)``; they need not add up to one.

    Returns:
        The weighted mean, ``(*shape)``.

    Example:
        >>> import torch
        >>> soup(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([1.0, 3.0]))
        tensor([2.5000, 2.0000])
    """
    return (shares(weights).to(models.dtype) @ models.flatten(1)).view(models.shape[1:])

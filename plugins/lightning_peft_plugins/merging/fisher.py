"""Fisher merging: the mean of models, each entry weighted by how much its model depends on it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.arguments import not_negative
from lightning_peft.merging.merge_function import Stacks


def norms(fisher: Stacks, normalise: bool) -> Tensor:
    """Return what each model's Fisher information is divided by, ``(n,)``: its norm over all tensors, or one."""
    squares = torch.stack([piece.double().square().sum(1) for piece in fisher()]).sum(0)
    return torch.where(squares > 0, squares.sqrt(), 1.0) if normalise else torch.ones_like(squares)


@merge_function(elementwise=True, surveys={"norms": norms})
def fisher(
    models: Tensor,
    fisher: Tensor,
    weights: Tensor,
    norms: Tensor,
    *,
    floor: float = 1e-6,
    normalise: bool = True,
    favour_first: bool = False,
) -> Tensor:
    """Average models by their Fisher information (Matena and Raffel, NeurIPS 2022, https://arxiv.org/abs/2111.09832).

    Args:
        models: Values, ``(n, *shape)``.
        fisher: The diagonal of each model's Fisher information, ``(n, *shape)``.
        weights: ``(n,)``, the coefficient of each model; they need not add up to one.
        norms: ``(n,)``, what each model's Fisher information is divided by.
        floor: The least Fisher information an entry has, so that one that no model depends on becomes a mean.
        normalise: Whether the Fisher information of each model is divided by its norm, after the floor.
        favour_first: Whether the floor holds for the first model alone, which then gives the entries that no model depends on.

    Returns:
        The weighted mean, ``(*shape)``.

    Example:
        >>> models, information = torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0], [1.0]])
        >>> fisher(models, information, torch.tensor([0.25, 0.75]), torch.ones(2))
        tensor([3.])
    """
    not_negative("floor", floor)
    least = models.new_full((len(models),), floor)
    if favour_first:
        least[1:] = 0
    column = (-1, *[1] * (models.dim() - 1))
    shares = fisher.maximum(least.view(column)) * (weights / norms).to(models.dtype).view(column)
    total = shares.sum(0)
    return torch.where(total == 0, models[0], (shares * models).sum(0) / total)

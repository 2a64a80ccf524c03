"""ComPEFT: differences of three values, the sign of the largest times one number a model."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.arguments import positive
from lightning_peft.merging.merge_function import Stacks
from lightning_peft_plugins.merging._shared import signs
from lightning_peft_plugins.merging._shared.signs import thresholds


def deviations(stacks: Stacks) -> Tensor:
    """Return the standard deviation of each model's differences, ``(n,)``."""
    count = sum(piece.shape[1] for piece in stacks())
    means = torch.stack([piece.double().sum(1) for piece in stacks()]).sum(0) / count
    squares = torch.stack([(piece.double() - means[:, None]).square().sum(1) for piece in stacks()]).sum(0)
    return squares.div(max(count - 1, 1)).sqrt()


@merge_function(elementwise=True, surveys={"thresholds": thresholds, "deviations": deviations})
def compeft(
    deltas: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    deviations: Tensor,
    *,
    density: float = 0.2,
    strength: float = 1.0,
) -> Tensor:
    """Add differences made ternary (Yadav et al., 2023, https://arxiv.org/abs/2311.13171, section 2).

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        weights: ``(n,)``, what each is multiplied by.
        thresholds: ``(n,)``: below it a difference becomes zero.
        deviations: ``(n,)``, the standard deviation of each model's differences.
        density: Share of each model's differences that stays.
        strength: How many standard deviations a difference that stays becomes, ``alpha`` in the paper, to be found on
            validation data.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> compeft(torch.tensor([[3.0, -1.0, -2.0]]), torch.ones(1), torch.tensor([2.0]), torch.tensor([0.5]))
        tensor([ 0.5000,  0.0000, -0.5000])
    """
    positive("strength", strength)
    sizes = (weights * strength * deviations).to(deltas.dtype).view(-1, *[1] * (deltas.dim() - 1))
    return (signs.trim_(deltas.clone(), thresholds).sign_() * sizes).sum(0)

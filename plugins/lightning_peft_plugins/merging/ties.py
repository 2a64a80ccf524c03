"""TIES: trim, elect a sign, average what agrees with it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_peft import merge_function
from lightning_peft_plugins.merging._shared import signs
from lightning_peft_plugins.merging._shared.signs import majority, thresholds


@merge_function(elementwise=True, surveys={"thresholds": thresholds, "majority": majority})
def ties(deltas: Tensor, thresholds: Tensor, majority: Callable[[], Tensor], *, density: float = 0.2) -> Tensor:
    """Merge what models agree on (Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708, algorithm 1).

    Of each model the largest differences stay, over all of its tensors together as in the official code
    (``per_tensor=True``: of each tensor). The sum over models elects a sign for each entry; those whose sum is zero take the
    sign that most elect.

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        thresholds: ``(n,)``: below it a difference is trimmed.
        majority: Called for the sign that most entries elect.
        density: Share of each model's differences that stays.

    Returns:
        The merged difference, ``(*shape)``.

    Example:
        >>> import torch
        >>> deltas = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, -4.0]])
        >>> ties(deltas, torch.tensor([1.0, 2.0]), lambda: torch.tensor(1.0))
        tensor([ 3.0000,  1.5000, -4.0000])
    """
    trimmed = signs.trim_(deltas.clone(), thresholds)
    return signs.disjoint_mean(trimmed, signs.elected(trimmed, majority))

"""TALL masks: which entries of a merged difference each task uses."""

from __future__ import annotations

from torch import Tensor


def tall_masks(deltas: Tensor, merged: Tensor, strictness: float = 0.4) -> Tensor:
    """Say which entries of a merged difference each task uses (Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813).

    A model of one task is nearly had back from the merged one as ``base + mask * merged``.

    Args:
        deltas: Differences of the models to the base, ``(n, *shape)``.
        merged: The merged difference, ``(*shape)``.
        strictness: How much further than its distance to the merged model a model must be from the base, ``lambda`` in the
            paper.

    Returns:
        ``(n, *shape)``, of booleans.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 3.0, 1.0])
        >>> tall_masks(torch.stack([one, two]), one + two)
        tensor([[ True, False,  True],
                [False,  True,  True]])
    """
    return deltas.abs() > (merged - deltas).abs_().mul_(strictness)

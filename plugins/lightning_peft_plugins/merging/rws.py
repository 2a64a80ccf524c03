"""Robust weight signatures: what training on corrupted data changed, beyond what clean training did, added to a clean model."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft import merge_function
from lightning_peft.merging.errors import MergeError


def signatures(robust: Tensor, clean: Tensor) -> Tensor:
    """Take the direction of the clean model's difference out of others.

    Args:
        robust: Differences of robust models, ``(n, entries)``.
        clean: That of the clean one, ``(entries,)``.

    Returns:
        ``(n, entries)``, orthogonal to ``clean``.

    Example:
        >>> signatures(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.0]))
        tensor([[0., 4.]])
    """
    square = clean @ clean
    return robust - torch.outer(robust @ clean / torch.where(square > 0, square, 1.0), clean)


@merge_function()
def rws(deltas: Tensor, weights: Tensor, place: float, *, until: float = 0.5) -> Tensor:
    """Patch a clean model (Cai et al., ICML 2023, https://arxiv.org/abs/2302.12480).

    Args:
        deltas: Differences to the base, ``(n, *shape)``: that of the clean model, then those of models robust to one corruption
            each.
        weights: ``(n,)``; what the signature of each robust model is multiplied by. The first is not used.
        place: Of the tensor among the model's, from 0 to 1.
        until: The last place that is patched: early layers hold most of what makes a model robust.

    Returns:
        The merged difference, ``(*shape)``.

    Raises:
        MergeError: ``until`` is not from 0 to 1.

    Example:
        >>> rws(torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.ones(2), 0.0)
        tensor([2., 4.])
    """
    if not 0 <= until <= 1:
        raise MergeError(f"until={until!r} must be from 0 to 1: the place of the last tensor that is patched.")
    if place > until:
        return deltas[0]
    clean, robust = deltas[0].flatten(), deltas[1:].flatten(1)
    return (clean + weights[1:].to(clean.dtype) @ signatures(robust, clean)).view(deltas.shape[1:])

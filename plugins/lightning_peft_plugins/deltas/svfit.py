"""SVFit: the largest singular values of a weight, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod
from lightning_peft_plugins.deltas._shared.diagonal_form import DiagonalForm


class SVFit(DeltaMethod):
    """SVFit (Sun et al., 2024): trains the first singular values of a weight; vectors and the rest stay as they are.

    Args:
        rank: Singular values to train; the vectors are frozen, so many cost little.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Example:
        >>> SVFit(rank=32)
        SVFit(rank=32, dropout=0.0, ...)
    """

    slots = Slots(form=("svfit",), init=())
    kind = DiagonalForm
    paper = "Sun et al., SVFit: Parameter-Efficient Fine-Tuning of Large Models Using Singular Values, 2024, arXiv 2409.05926"

    def __init__(self, rank: int = 64, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        form.start_as(right[..., : form.rank, :], values[..., : form.rank], left[..., : form.rank])

"""SORSA: principal singular triplets, trained with a penalty that keeps the vectors orthonormal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_peft import Run, Step
from lightning_peft.arguments import positive
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.orthogonality import factor_gaps
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta
from lightning_peft_plugins.deltas._shared.triplet_form import TripletForm


class SORSA(ScaledDelta):
    """SORSA (Cao 2024): trains the first singular values and vectors of a weight, the vectors held near orthonormal ones.

    Args:
        rank: Singular triplets to train.
        gamma: Weight of the penalty, which is divided by the peak learning rate.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> SORSA(rank=4, gamma=1e-4).gamma
        0.0001
    """

    slots = Slots(form=("triplet",), init=("pissa",), rule=("sorsa",))
    kind = TripletForm
    paper = "Cao, SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation, 2024, arXiv 2409.00055"

    def __init__(self, rank: int = 4, gamma: float = 4e-4, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)
        positive("gamma", gamma, "PiSSA trains the same part without a penalty.")
        self.gamma = gamma

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        rank = form.rank
        form.start_as(right[..., :rank, :], left[..., :rank], values[..., :rank])

    def start(self, run: Run) -> None:
        self._rate = max(_peak(group) for optimizer in run.trainer.optimizers for group in optimizer.param_groups)

    def loss(self, step: Step) -> Tensor:
        forms = [form for _, form in self.forms(step.run.module)]
        return self.gamma / self._rate * factor_gaps(forms) / (2 * len(forms))


def _peak(group: Mapping[str, Any]) -> float:
    """The learning rate that a scheduler starts from or rises to."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))

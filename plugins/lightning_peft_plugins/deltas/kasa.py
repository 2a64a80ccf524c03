"""KaSA: a weight without its smallest singular values, and a product of singular form beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor

from lightning_peft import Step
from lightning_peft.arguments import not_negative
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.orthogonality import factor_gaps
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta
from lightning_peft_plugins.deltas._shared.triplet_form import TripletForm


class KaSA(ScaledDelta):
    """KaSA (Wang et al., 2025): the smallest singular values leave the weight; ``B diag(d) A`` is trained with two penalties.

    What leaves the weight is not given back: the layer does not compute what it did.

    Args:
        rank: Rank of the product, and singular values that the weight loses.
        alpha: Numerator of the scale.
        beta: Weight of ``|d|^2``.
        gamma: Weight of the distance of both factors from orthonormal ones.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> KaSA(rank=4, gamma=0).gamma
        0
    """

    slots = Slots(form=("triplet",), init=("kasa",), rule=("kasa",))
    kind = TripletForm
    paper = "Wang et al., KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, ICLR 2025, arXiv 2412.06071"

    def __init__(self, rank: int = 8, alpha: float = 16, beta: float = 1e-4, gamma: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(rank, alpha, **kwargs)
        for argument, value in (("beta", beta), ("gamma", gamma)):
            not_negative(argument, value, "Zero leaves the penalty out.")
        self.beta, self.gamma = beta, gamma

    def _check(self, found: Sequence[Place]) -> None:
        if small := [place for place in found if self.rank == place.layout.largest_rank]:
            raise MisconfigurationException(
                f"rank={self.rank} would take all singular values of {small[0].tensor}. Give a smaller rank, or leave it "
                f"out: exclude={[place.path for place in small]!r} beside what is excluded now."
            )
        super()._check(found)

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        LowRankForm.reset(form, weight, generator)
        with torch.no_grad():
            form.values.normal_(generator=generator)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        last = slice(values.shape[-1] - form.rank, None)
        form.take_off(right[..., last, :], left[..., last] * values[..., last].unsqueeze(-2))

    def loss(self, step: Step) -> Tensor:
        forms = [form for _, form in self.forms(step.run.module)]
        sizes = torch.stack([form.values.square().sum() for form in forms]).sum()
        return (self.beta * sizes + self.gamma * factor_gaps(forms)) / len(forms)

"""A delta on the side of the weight: where masks and other maps act on the same tensor, or nothing calls the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.compose.lanes import Lane
from lightning_peft.deltas.form import Form, build_form, described
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.weights.weight_map import WeightMap


class DeltaMap(WeightMap):
    """Gives a layer the weight that a form makes of the frozen one.

    Args:
        form: The form, or what :func:`~lightning_peft.deltas.form.described` says of it.

    Attributes:
        tuned: What is trained as it is beside the delta: kinds or names of parameters.
    """

    kind = "weight_delta"
    lane = Lane.DELTA
    tuned: tuple[str, ...] = ()

    def __init__(self, form: Form | Mapping[str, Any]) -> None:
        super().__init__()
        self.form = form if isinstance(form, Form) else build_form(**form)

    def splits(self, weight: Tensor) -> bool:
        """So it can where torch takes the product apart with the weight."""
        return isinstance(self.form, LowRankForm) and weight.ndim == 2

    def forward(self, weight: Tensor) -> Tensor:
        return self.form.on_weight(weight)

    def config(self) -> dict[str, Any]:
        return {"form": described(self.form)}

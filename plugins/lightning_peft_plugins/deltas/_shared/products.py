"""Products of two thin matrices that the same first values and terms of a loss serve."""

from __future__ import annotations

from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.low_rank_form import LowRankForm

PRODUCTS: dict[str, type[LowRankForm]] = {"lora": LowRankForm, "dora": DecomposedForm}
"""Form by the name that ``form=`` has for it."""

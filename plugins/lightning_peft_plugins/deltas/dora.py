"""DoRA: a direction and a length for every output."""

from __future__ import annotations

from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta
from lightning_peft_plugins.deltas._shared.starts import STARTS


class DoRA(ProductDelta):
    """DoRA (Liu et al. 2024): LoRA turns the rows of a weight, and their lengths are learned apart; arguments as for LoRA.

    Beside linear layers the norm of the sum is found without making the sum. Elsewhere the delta acts on the weight.
    """

    slots = Slots(form=("dora",), init=tuple(STARTS))
    kind = DecomposedForm
    paper = "Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv 2402.09353"

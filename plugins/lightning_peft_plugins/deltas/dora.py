"""DoRA: a direction and a length for every output."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.sides import Place
from lightning_peft_plugins.deltas._shared.low_rank import LowRank


class DoRA(LowRank):
    """DoRA (Liu et al. 2024): LoRA turns the rows of a weight, and their lengths are learned apart; arguments as for LoRA.

    Beside linear layers the norm of the sum is found without making the sum. Elsewhere the delta acts on the weight.
    """

    kind = DecomposedForm
    paper = "Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv 2402.09353"

    def _check(self, found: Sequence[Place]) -> None:
        if table := next((place for place in found if isinstance(place.layer, nn.Embedding)), None):
            raise MisconfigurationException(
                f"{self.name} scales outputs, and the rows of {table.path} are none. Leave it out: exclude=[{table.path!r}]; "
                "LoRA takes embeddings."
            )
        super()._check(found)

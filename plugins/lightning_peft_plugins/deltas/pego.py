"""PEGO: several LoRAs beside every weight, held orthogonal to it and to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Step
from lightning_peft.arguments import positive
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.frozen_weights import frozen_weights
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta
from lightning_peft_plugins.deltas.functional.pego import diversify, preserve


class PEGO(ProductDelta):
    """PEGO (Hu et al., 2024): a group of LoRAs beside a weight keeps what the weight knows, and learns different things.

    The group is one product whose rank is that of all members. The loss gains ``strength`` times the sum of two terms over all
    weights: how far members are from orthogonal to the weight, and to each other.

    Args:
        rank: Rank of a member.
        members: LoRAs beside a weight.
        strength: Weight of both terms.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.product_delta.ProductDelta`.

    Raises:
        MisconfigurationException: Also where all members together have a rank above that of a weight.

    Example:
        >>> PEGO(rank=4, members=2).strength
        0.001
    """

    slots = Slots(rule=("pego",))
    fixed_arguments = frozenset({"alpha", "scaling", "init"})
    paper = (
        "Hu et al., Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain "
        "Generalization, ECCV 2024, arXiv 2407.15085"
    )

    def __init__(self, rank: int = 4, members: int = 4, strength: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(rank, None, "rank", "lora", **kwargs)
        positive("members", members)
        positive("strength", strength, "LoRA(rank=members * rank) trains the same product without the terms.")
        self.members, self.strength = members, strength

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"rank": self.members * self.rank}

    def _check(self, found: Sequence[Place]) -> None:
        if wide := [place for place in found if self.members * self.rank > place.layout.largest_rank]:
            raise MisconfigurationException(
                f"members={self.members} of rank={self.rank} have a rank of {self.members * self.rank} together, and "
                f"{wide[0].tensor} has {wide[0].layout.largest_rank}. Give smaller numbers, or leave out what is smaller: "
                f"exclude={[place.path for place in wide]!r} beside what is excluded now."
            )
        super()._check(found)

    def loss(self, step: Step) -> Tensor:
        """The two terms of all weights, in the precision of the group: sums over squares of the outputs are large."""
        module = step.run.module
        with torch.autocast(module.device.type, enabled=False):
            terms = [self._term(form, weight) for _, form, weight in frozen_weights(module, self.deltas(module))]
        return self.strength * torch.stack(terms).sum()

    def _term(self, form: Any, weight: Tensor) -> Tensor:
        down, up = form.rows(), form.up
        return preserve(weight, down, up, self.members) + diversify(down, up, self.members)

    def describe(self, module: nn.Module) -> str:
        return f"{self.members} members of {super().describe(module)}"

"""EVA: LoRA whose first factor reads what varies most in a layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.arguments import one_of
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft.network.layers import is_linear
from lightning_peft_plugins.deltas._shared.batch_start import BatchStart
from lightning_peft_plugins.deltas._shared.explained_ranks import ranks_by_share
from lightning_peft_plugins.deltas._shared.input_moments import covariance, explained, moments
from lightning_peft_plugins.deltas._shared.products import PRODUCTS


class EVA(BatchStart):
    """EVA (Paischer et al., 2024): ``A`` begins as the principal components of a layer's inputs, ``B`` as zero.

    The components are those of the training's first batches, found exactly.

    Args:
        rank: Components, and rank of the product.
        alpha: Numerator of the scale.
        looks: Optimizer steps whose inputs are looked at before the deltas are trained.
        rho: How far the ranks of weights may differ: none has more than ``rho * rank``, all together have ``rank`` a weight,
            and the components that explain most of their layer's inputs get them. 1 gives each the same. What a weight does
            not get stays zero in its factors, which have ``rho * rank`` rows.
        form: What is added to a weight: ``"lora"``, a product, or ``"dora"``, which learns the lengths of rows apart.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> EVA(rank=4, looks=2).looks
        2

    Raises:
        MisconfigurationException: Also for ``rho`` below 1.
    """

    slots = Slots(form=tuple(PRODUCTS), init=("eva",))
    paper = "Paischer et al., Parameter Efficient Fine-tuning via Explained Variance Adaptation, 2024, arXiv 2410.07170"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        looks: int = 8,
        rho: float = 1.0,
        form: Literal["lora", "dora"] = "lora",
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, looks, **kwargs)
        one_of("form", form, PRODUCTS)
        self.form, self.kind = form, PRODUCTS[form]
        if rho < 1:
            raise MisconfigurationException(f"rho={rho} must be at least 1, with which each weight has rank={rank}.")
        self.rho = rho

    def arguments(self, place: Place) -> dict[str, Any]:
        most = round(self.rank * self.rho) if place.called and is_linear(place.layer) else self.rank
        return super().arguments(place) | {"rank": min(most, place.layout.largest_rank)}

    def see(self, name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        self.add(name, moments(inputs))

    def begin_with(self, form: Any, weight: Tensor, seen: Tensor, rate: float) -> None:
        vectors = torch.linalg.eigh(covariance(seen).double()).eigenvectors  # in rising order of their values
        form.down.copy_(vectors.T.flip(0)[: form.rank])

    def begun(self, forms: Mapping[str, Any]) -> None:
        if self.rho == 1:
            return
        shares = [explained(covariance(self.seen[name]))[: form.rank] for name, form in forms.items()]
        for form, rank in zip(forms.values(), ranks_by_share(shares, self.rank * len(forms)), strict=True):
            form.down[rank:] = 0  # with zeros on both sides a row and its column never get a gradient

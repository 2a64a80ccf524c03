"""BA-LoRA: PiSSA with three terms against what a network brings along from its pretraining."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft import Resource, Step
from lightning_peft.arguments import not_negative, one_of, positive
from lightning_peft.deltas.slots import Slots
from lightning_peft.weights.frozen_answers import frozen_answers
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta
from lightning_peft_plugins.deltas._shared.products import PRODUCTS
from lightning_peft_plugins.deltas.functional.ba_lora import consistency, leading_share, sameness


class BALoRA(ProductDelta):
    """BA-LoRA (Chang et al., 2024): predictions stay near the network's own, differ between samples, and have few directions.

    Logits of two dimensions are taken for those of classes, of three for those of tokens; the terms differ.

    Args:
        rank: Singular directions to train.
        alpha: Numerator of the scale.
        consistency: Weight of the distance from what the network predicts without the delta.
        diversity: Weight of the covariance between classes, or of the lack of entropy.
        singular: Weight of the share of singular values below the first ``top``.
        top: Singular values of a batch's logits that are to hold it.
        form: What is added to a weight: ``"lora"``, a product, or ``"dora"``, which learns the lengths of rows apart.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.product_delta.ProductDelta`.

    Raises:
        MisconfigurationException: A weight below zero.

    Example:
        >>> BALoRA(rank=4, singular=0.0).top
        5
    """

    slots = Slots(form=tuple(PRODUCTS), init=("pissa",), rule=("ba-lora",))
    reads = frozenset({Resource.LOGITS})
    fixed_arguments = frozenset({"init"})
    paper = "Chang et al., BA-LoRA: Bias-Alleviating Low-Rank Adaptation, 2024, arXiv 2408.04556"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        consistency: float = 1e-4,
        diversity: float = 3e-4,
        singular: float = 1e-4,
        top: int = 5,
        form: Literal["lora", "dora"] = "lora",
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, init="pissa", **kwargs)
        for argument, value in (("consistency", consistency), ("diversity", diversity), ("singular", singular)):
            not_negative(argument, value, "Zero leaves the term out.")
        positive("top", top)
        one_of("form", form, PRODUCTS)
        self.form, self.kind = form, PRODUCTS[form]
        self.consistency, self.diversity, self.singular, self.top = consistency, diversity, singular, top

    def loss(self, step: Step) -> Tensor:
        logits = step.logits.float() if step.logits.dtype in (torch.float16, torch.bfloat16) else step.logits
        term = self.diversity * sameness(logits) - self.singular * leading_share(logits, self.top)
        if self.consistency:
            term = term + self.consistency * consistency(logits, frozen_answers(step, self.name).to(logits.dtype))
        return term

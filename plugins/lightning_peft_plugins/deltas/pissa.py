"""PiSSA: LoRA that trains the principal part of a weight and freezes the rest."""

from __future__ import annotations

from typing import Any, Literal

from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta


class PiSSA(ProductDelta):
    """PiSSA (Meng et al. 2024): the product begins as the first singular directions of the weight, which the weight loses.

    Args:
        rank: Singular directions to train.
        alpha: Numerator of the scale.
        scaling: What it is divided by.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Example:
        >>> PiSSA(rank=4)
        PiSSA(rank=4, scaling='rank', lr_ratio=1.0, ...)
    """

    fixed_arguments = frozenset({"init"})
    paper = (
        "Meng, Wang, Zhang, PiSSA: Principal Singular Values and Singular Vectors Adaptation, NeurIPS 2024, arXiv 2404.02948"
    )

    def __init__(
        self, rank: int = 8, alpha: float | None = None, scaling: Literal["rank", "root"] = "rank", **kwargs: Any
    ) -> None:
        super().__init__(rank, alpha, scaling, init="pissa", **kwargs)

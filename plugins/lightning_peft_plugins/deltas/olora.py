"""OLoRA: LoRA that begins with orthonormal columns of the weight."""

from __future__ import annotations

from typing import Any, Literal

from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta


class OLoRA(ProductDelta):
    """OLoRA (Büyükakyüz 2024): the product begins as the first columns and rows of ``W = Q R``, which the weight loses.

    Args:
        rank: Columns of ``Q``.
        alpha: Numerator of the scale.
        scaling: What it is divided by.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Example:
        >>> OLoRA(rank=4)
        OLoRA(rank=4, scaling='rank', lr_ratio=1.0, ...)
    """

    fixed_arguments = frozenset({"init"})
    paper = "Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024, arXiv 2406.01775"

    def __init__(
        self, rank: int = 8, alpha: float | None = None, scaling: Literal["rank", "root"] = "rank", **kwargs: Any
    ) -> None:
        super().__init__(rank, alpha, scaling, init="olora", **kwargs)

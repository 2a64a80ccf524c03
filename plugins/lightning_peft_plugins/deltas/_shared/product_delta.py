"""The low-rank product as a method, with the choice of its first values."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Generator, Tensor, nn

from lightning_peft.arguments import one_of, positive
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.sides import Place
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta
from lightning_peft_plugins.deltas._shared.starts import STARTS


class ProductDelta(ScaledDelta):
    """Trains a low-rank product that is added to frozen weights, ``W + scale B A``.

    Args:
        rank: Rows of ``A`` and columns of ``B``.
        alpha: Numerator of the scale; the rank by default, so that the scale is 1.
        scaling: What it is divided by: ``"rank"``, or ``"root"`` of the rank (Kalajdzievski, rsLoRA, 2023, arXiv 2312.03732).
        init: First values: ``"lora"``, a random ``A`` and no ``B``; ``"pissa"`` and ``"olora"`` take a part of the weight out
            of it, to train that.
        lr_ratio: Factor on the learning rate of ``B`` (Hayou et al., LoRA+, ICML 2024, arXiv 2402.12354; they take 16).
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.
    """

    kind = LowRankForm
    paper = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        scaling: Literal["rank", "root"] = "rank",
        init: Literal["lora", "pissa", "olora"] = "lora",
        lr_ratio: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, scaling, **kwargs)
        one_of("init", init, STARTS)
        positive("lr_ratio", lr_ratio, "It is a factor on the learning rate of B.")
        self.init, self.lr_ratio = init, lr_ratio

    def attach(self, module: LightningModule) -> None:
        """Put the deltas on, ``B`` with its own learning rate."""
        super().attach(module)
        for _, delta in self.deltas(module):
            delta.faster = {} if self.lr_ratio == 1 else {"form.up": ("form.down", self.lr_ratio)}

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"table": isinstance(place.layer, nn.Embedding)}

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        STARTS[self.init](form, weight, generator)

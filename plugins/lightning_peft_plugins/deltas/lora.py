"""LoRA: a product of two thin matrices, added to frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor

from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta
from lightning_peft_plugins.deltas._shared.sliced_form import SlicedForm
from lightning_peft_plugins.deltas._shared.starts import STARTS


class LoRA(ProductDelta):
    """LoRA (Hu et al. 2022): trains ``B A`` in ``W + (alpha / rank) B A``; everything that is not named is frozen for the fit.

    Args:
        rank: Rows of ``A`` and columns of ``B``.
        alpha: Numerator of the scale; the rank by default, so that the scale is 1.
        scaling: What it is divided by: ``"rank"``, or ``"root"`` of the rank (Kalajdzievski, rsLoRA, 2023, arXiv 2312.03732).
        qkv: Letters of ``"qkv"``: thirds of the targets' outputs that get a product each, in layers that project to queries,
            keys and values at once and in this order. All targets are such layers then.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.product_delta.ProductDelta`.

    Raises:
        MisconfigurationException: Also for ``qkv`` with targets that have no thirds.

    Example:
        >>> LoRA(rank=4, tune=("head",))
        LoRA(rank=4, scaling='rank', init='lora', lr_ratio=1.0, dropout=0.0, tune=('head',), ...)
        >>> LoRA(targets=["attn.qkv"], qkv="qv").qkv
        'qv'
    """

    slots = Slots(init=tuple(STARTS))

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        scaling: Literal["rank", "root"] = "rank",
        qkv: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, scaling, **kwargs)
        if qkv is not None and (not qkv or not set(qkv) <= set("qkv")):
            raise MisconfigurationException(f"qkv={qkv!r} must be letters of 'qkv', for instance 'qv'.")
        if qkv and self.init != "lora":
            raise MisconfigurationException(f"init={self.init!r} takes a part out of a whole weight. Leave qkv={qkv!r} out.")
        self.qkv = qkv
        if qkv:
            self.kind = SlicedForm  # type: ignore[misc]

    def arguments(self, place: Place) -> dict[str, Any]:
        if not self.qkv:
            return super().arguments(place)
        return {"rank": self.rank, "scale": self.scale, "slices": [i for i in range(3) if "qkv"[i] in self.qkv], "count": 3}

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        if self.qkv:
            form.reset(weight, generator)
        else:
            super().begin(form, weight, generator)

    def _check(self, found: Sequence[Place]) -> None:
        super()._check(found)
        odd = [place for place in found if place.layout.stacked or place.layout.matrix_shape[0] % 3]
        if self.qkv and odd:
            raise MisconfigurationException(
                f"qkv={self.qkv!r} is for layers that project to queries, keys and values at once, and {odd[0].tensor}, "
                f"{tuple(odd[0].layout.shape)}, has no thirds. Name those layers with targets=, for instance "
                "targets=['attn.qkv']; a second LoRA with another name= can take others."
            )

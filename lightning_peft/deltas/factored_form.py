"""Deltas that are a product of two thin matrices, whatever those are made of."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_peft.deltas.form import Beside, Form


class FactoredForm(Form):
    """``scale B A``; subclasses define :meth:`factors`.

    Such a delta can stand beside a layer, which then keeps no weight that was made.

    Attributes:
        scale: Factor of the product.
    """

    beside: ClassVar[Beside] = "any"
    scale: float = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A``, shape ``(rank, inputs)``, and ``B``, ``(outputs, rank)``, each a stack where the weight is one."""
        raise NotImplementedError

    def written_factors(self) -> tuple[Tensor, Tensor]:
        """Return factors of the same product for a file, without rows and columns that add nothing for good."""
        return self.factors()

    def delta(self) -> Tensor:
        down, up = self.factors()
        return self.scale * (up @ down)

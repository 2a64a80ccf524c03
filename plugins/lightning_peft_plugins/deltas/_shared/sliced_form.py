"""A low-rank product for each of some slices of a fused projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout


class SlicedForm(FactoredForm):
    """``scale B_i A_i`` in every slice ``i`` that is named, of slices of equal height; nothing in the others.

    ``A``, :attr:`down`, has shape ``(slices, rank, inputs)``, ``B``, :attr:`up`, ``(slices, outputs / count, rank)``.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of every ``A_i``.
        scale: Factor of the products.
        slices: The slices, from 0.
        count: How many there are in all.
    """

    kind = "sliced"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, slices: Sequence[int] = (0,), count: int = 1) -> None:
        super().__init__(layout, rank)
        self.scale, self.slices, self.count = scale, list(slices), count
        outputs, inputs = layout.matrix_shape
        self.down = nn.Parameter(torch.zeros(len(slices), rank, inputs))
        self.up = nn.Parameter(torch.zeros(len(slices), outputs // count, rank))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        bound = 1 / math.sqrt(self.down.shape[-1])
        with torch.no_grad():
            self.down.uniform_(-bound, bound, generator=generator)
            self.up.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        height, rank = self.up.shape[1:]
        up = self.up.new_zeros(self.count, height, len(self.slices), rank)
        up[self.slices, :, range(len(self.slices))] = self.up
        return self.down.flatten(0, 1), up.flatten(2).flatten(0, 1)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "slices": self.slices, "count": self.count}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, slices: Sequence[int] = (0,), count: int = 1, **arguments: Any) -> int:
        outputs, inputs = layout.matrix_shape
        return len(slices) * rank * (outputs // count + inputs)

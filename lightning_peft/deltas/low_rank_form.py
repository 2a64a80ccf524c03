"""A product of two thin matrices: LoRA and its scalings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Size, Tensor, nn

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.layout import Layout


class LowRankForm(Form):
    """``scale B A`` (Hu et al., LoRA, ICLR 2022, arXiv 2106.09685, section 4.1).

    ``A``, :attr:`down`, has shape ``(rank, inputs)``, with the kernel's dimensions behind for convolutions; ``B``, :attr:`up`,
    ``(outputs, rank)``; both have the number of matrices before it in a stack.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of ``A``.
        scale: Factor of the product.
        table: Whether rows of the weight are looked up, as in an embedding; ``A`` starts from a normal distribution then.
    """

    kind = "low_rank"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, table: bool = False) -> None:
        super().__init__(layout, rank)
        self.scale, self.table = scale, table
        *stack, outputs, inputs = layout.matrix_shape
        beside = layout.shape[1:] if not (layout.stacked or layout.transposed) else (inputs,)
        self.down = nn.Parameter(torch.zeros(*stack, rank, *beside))
        self.up = nn.Parameter(torch.zeros(*stack, outputs, rank))

    @property
    def layout(self) -> Layout:
        first = self._layout
        if first.stacked:
            return first
        outputs, inputs = self.up.shape[0], self.down.shape[1:]
        return replace(first, shape=Size([*inputs, outputs] if first.transposed else [outputs, *inputs]))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            if self.table:
                self.down.normal_(generator=generator)
            else:  # Kaiming's for a leak of the root of five, of which every row is one output
                bound = 1 / math.sqrt(self.layout.matrix_shape[-1])
                self.down.uniform_(-bound, bound, generator=generator)
            self.up.zero_()

    def rows(self) -> Tensor:
        """``A`` as a matrix, or as a stack of them."""
        return self.down if self.layout.stacked else self.down.flatten(1)

    def delta(self) -> Tensor:
        return self.scale * (self.up @ self.rows())

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "table": self.table}

    @classmethod
    def trainable(cls, layout: Layout, rank: int) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        return math.prod(stack) * rank * (outputs + inputs)

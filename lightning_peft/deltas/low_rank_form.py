"""A product of two thin matrices: LoRA and its scalings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Size, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout


class LowRankForm(FactoredForm):
    """``scale B A`` (Hu et al., LoRA, ICLR 2022, arXiv 2106.09685, section 4.1).

    ``A``, :attr:`down`, has shape ``(rank, inputs)``, with the kernel's dimensions behind for convolutions; ``B``, :attr:`up`,
    ``(outputs, rank)``; both have the number of matrices before it in a stack.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of ``A``.
        scale: Factor of the product.
        table: Whether rows of the weight are looked up, as in an embedding; ``A`` starts from a normal distribution then.
        taken: Rank of a product that is taken off the frozen weight for good, see :meth:`take_off`.
    """

    kind = "low_rank"
    taken_down: Tensor
    taken_up: Tensor

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, table: bool = False, taken: int = 0) -> None:
        super().__init__(layout, rank)
        self.scale, self.table = scale, table
        *stack, outputs, _ = layout.matrix_shape
        beside = layout.input_shape
        self.down = nn.Parameter(torch.zeros(*stack, rank, *beside))
        self.up = nn.Parameter(torch.zeros(*stack, outputs, rank))
        self.taken = taken
        if taken:
            self.register_buffer("taken_down", torch.zeros(*stack, taken, *beside))
            self.register_buffer("taken_up", torch.zeros(*stack, outputs, taken))

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

    def start_as(self, down: Tensor, up: Tensor) -> None:
        """Let the product begin as another one, which is taken off the frozen weight: the layer computes what it did.

        Args:
            down: Shape ``(rank, inputs)``.
            up: Shape ``(outputs, rank)``; the scale stands before the product of both.
        """
        self.set_factors(down, up)
        self.take_off(down, self.scale * up)

    @torch.no_grad()
    def set_factors(self, down: Tensor, up: Tensor) -> None:
        """Set both factors, given as matrices."""
        self.down.copy_(down.view_as(self.down))
        self.up.copy_(up)

    def take_off(self, down: Tensor, up: Tensor) -> None:
        """Take ``up @ down`` off the frozen weight for good; the weight itself stays the base's.

        Args:
            down: Shape ``(taken, inputs)``.
            up: Shape ``(outputs, taken)``.
        """
        if self.taken != down.shape[-2]:
            self.taken = down.shape[-2]
            beside = self.down.shape[self.up.ndim - 1 :]
            self.register_buffer("taken_down", down.new_empty(*down.shape[:-1], *beside))
            self.register_buffer("taken_up", torch.empty_like(up))
        with torch.no_grad():
            self.taken_down.copy_(down.view_as(self.taken_down))
            self.taken_up.copy_(up)

    def rows(self) -> Tensor:
        """``A`` as a matrix, or as a stack of them."""
        return self._matrix(self.down)

    def _matrix(self, down: Tensor) -> Tensor:
        return down if down.ndim == 2 or self._layout.stacked else down.flatten(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        if not self.taken:
            return self.rows(), self.up
        down = torch.cat([self.rows(), self._matrix(self.taken_down)], -2)
        return down, torch.cat([self.up, self.taken_up / -self.scale], -1)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "table": self.table, "taken": self.taken}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        return math.prod(stack) * rank * (outputs + inputs)

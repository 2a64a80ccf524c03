"""A product with a square matrix in its middle that grows by a border of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.layout import Layout
from lightning_peft_plugins.deltas._shared.blocks_form import BlocksForm

_SPREAD = 0.02


class TriangularForm(BlocksForm):
    """``alpha / rank · B (C A)`` with ``C`` from a lower and an upper triangle of blocks (Liang et al., TriAdaptLoRA, 2025).

    The lower triangle has the rows of a block up to and with its own columns, :attr:`rows`, the upper one its columns down to
    and with its own rows, :attr:`columns`; on the diagonal both are added. A block that begins to count is a border around
    those before it, and changes nothing: its rows of ``C`` and ``A`` are random, its columns of ``C`` and ``B`` zero.

    Args:
        layout: How the weight is read as a matrix.
        rank: Side of the first block.
        scale: ``alpha``.
        increment: Side of every further block.
        blocks: Further blocks.
    """

    kind = "triangular"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, increment: int = 1, blocks: int = 1) -> None:
        super().__init__(layout, rank, scale, increment, blocks)
        stack, borders = layout.matrix_shape[:-2], list(_borders(rank, increment, blocks))
        self.rows = nn.ParameterList(torch.zeros(*stack, size, upto) for size, upto in borders)
        self.columns = nn.ParameterList(torch.zeros(*stack, upto, size) for size, upto in borders)

    def reset(self, weight: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            for random in (*self.down, *self.rows):
                random.normal_(0, _SPREAD, generator=generator)
            for zero in (*self.up, *self.columns):
                zero.zero_()

    def middle(self) -> Tensor:
        """``C``, shape ``(rank, rank)`` with the rank of the blocks that count."""
        first, *borders = zip(self.blocks_of(self.rows), self.blocks_of(self.columns), strict=True)
        made = first[0] + first[1]
        for row, column in borders:
            before = made.shape[-1]
            above = torch.cat([made, column[..., :before, :]], -1)
            below = torch.cat([row[..., :before], row[..., before:] + column[..., before:, :]], -1)
            made = torch.cat([above, below], -2)
        return made

    def joined(self) -> tuple[Tensor, Tensor]:
        """``A``, shape ``(rank, inputs)``, and ``B``, ``(outputs, rank)``, of the blocks that count."""
        return torch.cat(self.blocks_of(self.down), -2), torch.cat(self.blocks_of(self.up), -1)

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.joined()
        return self.middle() @ down, up

    def size(self) -> Tensor:
        """``|C|`` by the Frobenius norm, over the number of blocks: what growths are judged by."""
        return torch.linalg.vector_norm(self.middle()) / self.used

    @torch.no_grad()
    def grow(self, rescale: bool) -> None:
        """Let the next block count; ``B`` is what is rescaled, since ``C`` is judged by its size."""
        before = self.scale
        self.grown += 1
        if rescale:
            for up in self.up[: self.grown]:
                up.mul_(before / self.scale)

    def idle(self) -> Iterator[nn.Parameter]:
        yield from super().idle()
        for triangle in (self.rows, self.columns):
            yield from triangle[self.used :]

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, increment: int = 1, blocks: int = 1, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        triangles = 2 * sum(size * upto for size, upto in _borders(rank, increment, blocks))
        return math.prod(stack) * ((rank + increment * blocks) * (outputs + inputs) + triangles)


def _borders(rank: int, increment: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Yield the side of every block, and what it comes to with those before."""
    yield rank, rank
    for block in range(1, blocks + 1):
        yield increment, rank + increment * block

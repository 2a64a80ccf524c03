"""A product with room for a larger rank, block by block: IncreLoRA, TriAdaptLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout

LEAST = 1e-5  # added to the rank under the scale
_MOST = 2**14


class BlocksForm(FactoredForm):
    """``alpha / rank`` times a product in blocks, of which the first ones count, with the rank that they have in all.

    Blocks behind those take no part: nothing is computed with them, and they have neither gradients nor optimizer state. Each
    has some rows of ``A``, :attr:`down`, and columns of ``B``, :attr:`up`.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rank of the first block.
        scale: ``alpha``.
        increment: Rank of every further block.
        blocks: Further blocks.

    Attributes:
        grown: Further blocks that count.
    """

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, increment: int = 1, blocks: int = 1) -> None:
        super().__init__(layout, rank)
        if not 0 <= blocks <= _MOST:  # a file may say anything
            raise ValueError(f"a product has 0 to {_MOST:,} further blocks, not {blocks}")
        self.alpha, self.increment, self.blocks = scale, increment, blocks
        self.sizes = [rank, *[increment] * blocks]
        *stack, outputs, inputs = layout.matrix_shape
        self.down = nn.ParameterList(torch.zeros(*stack, size, inputs) for size in self.sizes)
        self.up = nn.ParameterList(torch.zeros(*stack, outputs, size) for size in self.sizes)
        self.grown = 0

    @property
    def layout(self) -> Layout:
        first = self._layout
        if first.stacked or len(first.shape) != 2:
            return first
        sizes = [self.up[0].shape[0], self.down[0].shape[1]]
        return replace(first, shape=Size(sizes[::-1] if first.transposed else sizes))

    @property
    def ranks(self) -> int:
        """Rank of the blocks that count."""
        return self.rank + self.increment * self.grown

    @property
    def room(self) -> int:
        """The largest rank that can count."""
        return self.rank + self.increment * self.blocks

    @property
    def full(self) -> bool:
        """Whether no block can begin to count any more."""
        return self.ranks >= self.room

    @property
    def used(self) -> int:
        """Blocks that take part."""
        return 1 + self.grown

    def blocks_of(self, factors: nn.ParameterList) -> list[Tensor]:
        """Return those of some factors that take part."""
        return [*factors][: self.used]  # a slice of the list itself makes parameters of what is whole in place of shards

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Factor of the product; falls with every block that begins to count."""
        return self.alpha / (self.ranks + LEAST)

    def grow(self, rescale: bool) -> None:
        """Let the next block count.

        Args:
            rescale: Multiply a factor by what the scale loses, so that the product stays what it is.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """Nothing will grow any more."""

    def idle(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are not trained yet."""
        for factors in (self.down, self.up):
            yield from factors[self.used :]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.grown])

    def set_extra_state(self, state: Tensor) -> None:
        (grown,) = state.tolist()
        if not 0 <= grown <= self.blocks:
            raise ValueError(f"{grown} of {self.blocks} blocks cannot have grown")
        self.grown = grown

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.alpha, "increment": self.increment, "blocks": self.blocks}

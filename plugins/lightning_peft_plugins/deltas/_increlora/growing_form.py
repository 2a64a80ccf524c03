"""A product of triplets that has room for more of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from lightning_peft.capture.look import GradientLook
from lightning_peft.deltas.form import Beside
from lightning_peft.deltas.layout import Layout
from lightning_peft_plugins.deltas._shared.blocks_form import LEAST, BlocksForm

_SPREAD = 0.02


class GrowingForm(BlocksForm):
    """``alpha / rank · B diag(E) A`` in blocks of triplets (Zhang et al., IncreLoRA, 2023).

    The block after those that count may be in reserve: its values are small and fixed, its vectors are trained. The last one
    never counts, and is there to be in reserve behind the others.

    Args:
        layout: How the weight is read as a matrix.
        rank: Triplets of the first block.
        scale: ``alpha``.
        increment: Triplets of every further block.
        blocks: Further blocks.

    Attributes:
        reserved: Whether one more block than those that count is in reserve.
        watched: Whether gradients of the product are looked at.
        score: What was seen of them in the latest backward pass, see :meth:`see`.
    """

    kind = "growing"
    beside: ClassVar[Beside] = "linear"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, increment: int = 1, blocks: int = 1) -> None:
        super().__init__(layout, rank, scale, increment, blocks)
        stack = layout.matrix_shape[:-2]
        self.values = nn.ParameterList(torch.zeros(*stack, size) for size in self.sizes)
        self.reserved, self.watched = False, False
        self.score: Tensor | None = None
        self._look = GradientLook(self.see)

    def reset(self, weight: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            for factor in (*self.down, *self.up):
                factor.normal_(0, _SPREAD, generator=generator)
            for values in self.values:
                values.zero_()

    @property
    def room(self) -> int:
        return self.rank + self.increment * (self.blocks - 1)

    @property
    def used(self) -> int:
        """Blocks that take part, one in reserve included."""
        return 1 + self.grown + self.reserved  # compilers know no properties of super()

    @torch.no_grad()
    def reserve(self) -> None:
        """Take the next block in reserve."""
        self.reserved = True
        self.values[self.grown + 1].fill_(LEAST)

    @torch.no_grad()
    def grow(self, rescale: bool) -> None:
        """Let the block in reserve count, and take the next one in reserve; the values are what is rescaled."""
        before = self.scale
        self.grown += 1
        if rescale:
            for values in self.values[: self.grown + 1]:
                values.mul_(before / self.scale)
        self.reserve()

    @torch.no_grad()
    def settle(self) -> None:
        """Let the block in reserve add nothing, when there will be no further growth."""
        if self.reserved:
            self.values[self.grown + 1].zero_()
        self.watched, self.score = False, None

    def idle(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are not trained yet: values in reserve, and all of the blocks behind."""
        yield from self.values[1 + self.grown :]
        yield from super().idle()

    def factors(self) -> tuple[Tensor, Tensor]:
        downs, values, ups = (self.blocks_of(each) for each in (self.down, self.values, self.up))
        return torch.cat(downs, -2) * torch.cat(values, -1).unsqueeze(-1), torch.cat(ups, -1)

    def written_factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.factors()
        return (down, up) if self.layout.stacked else (down[: self.ranks], up[:, : self.ranks])

    def delta(self) -> Tensor:
        down, up = self.factors()
        made = self.scale * (up @ down)
        return self._look(made, down, up) if self.watched else made

    @torch.no_grad()
    def see(self, gradient: Tensor, down: Tensor, up: Tensor) -> None:
        """Score the product by its gradient: ``sum |product · gradient|`` over the root of their number (section 3.2).

        Args:
            gradient: Of the loss for the product, in its shape.
            down: First of the factors as the forward pass had them; the parameters may be shards when a gradient comes.
            up: Second of them.
        """
        product = self.scale * (up @ down)
        self.score = (product * gradient.to(product.dtype)).abs().sum() / math.sqrt(product.numel())

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.grown, int(self.reserved)])

    def set_extra_state(self, state: Tensor) -> None:
        grown, reserved = state.tolist()
        if not (0 <= grown <= self.blocks - 1 and reserved in (0, 1)):
            raise ValueError(f"{grown} of {self.blocks} blocks cannot have grown")
        self.grown, self.reserved = grown, bool(reserved)

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, increment: int = 1, blocks: int = 1, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        return math.prod(stack) * (rank + increment * blocks) * (outputs + inputs + 1)

"""A product of triplets that has room for more of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, Size, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.form import Beside
from lightning_peft.deltas.layout import Layout

_LEAST = 1e-5  # added to the rank under the scale, and the value that triplets in reserve have
_SPREAD = 0.02


class GrowingForm(FactoredForm):
    """``alpha / rank · B diag(E) A`` in blocks of triplets, of which the first ones count (Zhang et al., IncreLoRA, 2023).

    The block after those that count may be in reserve: its values are small and fixed, its vectors are trained. Blocks behind
    it take no part: nothing is computed with them, and they have neither gradients nor optimizer state.

    Args:
        layout: How the weight is read as a matrix.
        rank: Triplets of the first block.
        scale: ``alpha``.
        increment: Triplets of every further block.
        blocks: Further blocks.

    Attributes:
        grown: Further blocks that count.
        reserved: Whether one more is in reserve.
        watched: Whether gradients of the product are looked at.
        score: What was seen of them in the latest backward pass, see :meth:`see`.
    """

    kind = "growing"
    beside: ClassVar[Beside] = "linear"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, increment: int = 1, blocks: int = 1) -> None:
        super().__init__(layout, rank)
        self.alpha, self.increment, self.blocks = scale, increment, blocks
        *stack, outputs, inputs = layout.matrix_shape
        sizes = [rank, *[increment] * blocks]
        self.down = nn.ParameterList(torch.zeros(*stack, size, inputs) for size in sizes)
        self.values = nn.ParameterList(torch.zeros(*stack, size) for size in sizes)
        self.up = nn.ParameterList(torch.zeros(*stack, outputs, size) for size in sizes)
        self.grown, self.reserved, self.watched = 0, False, False
        self.score: Tensor | None = None

    @property
    def layout(self) -> Layout:
        first = self._layout
        if first.stacked or len(first.shape) != 2:
            return first
        sizes = [self.up[0].shape[0], self.down[0].shape[1]]
        return replace(first, shape=Size(sizes[::-1] if first.transposed else sizes))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            for factor in (*self.down, *self.up):
                factor.normal_(0, _SPREAD, generator=generator)
            for values in self.values:
                values.zero_()

    @property
    def ranks(self) -> int:
        """Triplets that count."""
        return self.rank + self.increment * self.grown

    @property
    def used(self) -> int:
        """Blocks that take part, the first one and one in reserve included."""
        return 1 + self.grown + self.reserved

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Factor of the product; falls with every block that begins to count."""
        return self.alpha / (self.ranks + _LEAST)

    @property
    def full(self) -> bool:
        """Whether no block can begin to count any more: the last one stays in reserve."""
        return self.grown + 1 >= self.blocks

    @torch.no_grad()
    def reserve(self) -> None:
        """Take the next block in reserve."""
        self.reserved = True
        self.values[self.grown + 1].fill_(_LEAST)

    @torch.no_grad()
    def grow(self, rescale: bool) -> None:
        """Let the block in reserve count, and take the next one in reserve.

        Args:
            rescale: Multiply the values by what the scale loses, so that the product stays what it is.
        """
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
        for factors in (self.down, self.up):
            yield from factors[self.used :]

    def factors(self) -> tuple[Tensor, Tensor]:
        values = torch.cat([*self.values[: self.used]], -1).unsqueeze(-1)
        return torch.cat([*self.down[: self.used]], -2) * values, torch.cat([*self.up[: self.used]], -1)

    def written_factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.factors()
        return (down, up) if self.layout.stacked else (down[: self.ranks], up[:, : self.ranks])

    def delta(self) -> Tensor:
        made = super().delta()
        if self.watched and made.requires_grad:
            made.register_hook(self.see)
        return made

    @torch.no_grad()
    def see(self, gradient: Tensor) -> None:
        """Score the product by its gradient: ``sum |product · gradient|`` over the root of their number (section 3.2).

        Args:
            gradient: Of the loss for the product, in its shape.
        """
        product = FactoredForm.delta(self)
        self.score = (product * gradient.to(product.dtype)).abs().sum() / math.sqrt(product.numel())

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.grown, int(self.reserved)])

    def set_extra_state(self, state: Tensor) -> None:
        grown, reserved = state.tolist()
        if not (0 <= grown <= self.blocks - 1 and reserved in (0, 1)):
            raise ValueError(f"{grown} of {self.blocks} blocks cannot have grown")
        self.grown, self.reserved = grown, bool(reserved)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.alpha, "increment": self.increment, "blocks": self.blocks}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, increment: int = 1, blocks: int = 1, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        return math.prod(stack) * (rank + increment * blocks) * (outputs + inputs + 1)

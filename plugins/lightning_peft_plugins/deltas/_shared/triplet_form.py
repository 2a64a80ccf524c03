"""A low-rank product with a number between its factors for every rank: AdaLoRA, SORSA, KaSA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.low_rank_form import LowRankForm


class TripletForm(LowRankForm):
    """``scale B diag(E) A`` (Zhang et al., AdaLoRA, ICLR 2023, equation 3).

    ``E``, :attr:`values`, has shape ``(rank,)``. It starts as zero, and both factors from a normal distribution.
    """

    kind = "triplet"
    spread = 0.02

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, table: bool = False, taken: int = 0) -> None:
        super().__init__(layout, rank, scale, table, taken)
        self.values = nn.Parameter(torch.zeros(*self.up.shape[:-2], rank))

    @property
    def peft(self) -> str:
        return "LORA.kasa_config" if self.taken else "ADALORA"

    def reset(self, weight: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            self.down.normal_(0, self.spread, generator=generator)
            self.up.normal_(0, self.spread, generator=generator)
            self.values.zero_()

    def start_as(self, down: Tensor, up: Tensor, values: Tensor | None = None) -> None:
        """Let the product begin as another one, see :class:`~lightning_peft.deltas.low_rank_form.LowRankForm`.

        Args:
            down: Shape ``(rank, inputs)``.
            up: Shape ``(outputs, rank)``.
            values: Shape ``(rank,)``; ones by default.
        """
        self.set_factors(down, up)
        with torch.no_grad():
            self.values.copy_(torch.ones_like(self.values) if values is None else values)
        self.take_off(self.values.unsqueeze(-1) * down, self.scale * up)

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = super().factors()
        values = torch.cat([self.values, self.values.new_ones(*self.values.shape[:-1], self.taken)], -1)
        return down * values.unsqueeze(-1), up

    def written_factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.factors()
        if self.layout.stacked:
            return down, up
        kept = self.values != 0
        kept[0] |= ~kept.any()  # a file has no rank of zero
        kept = torch.cat([kept, kept.new_ones(self.taken)])
        return down[kept], up[:, kept]

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        return super().trainable(layout, rank) + layout.matrix_shape[:-2].numel() * rank

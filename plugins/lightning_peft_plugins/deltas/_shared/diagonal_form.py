"""Numbers between two fixed factors: SVFit, LoLDU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout


class DiagonalForm(FactoredForm):
    """``B (gain diag(z) - diag(z0)) A`` with fixed ``A`` and ``B``: of ``B diag(z0) A`` in the weight, ``z`` is trained.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of ``A``; ``z``, :attr:`values`, has one number for each.
        gained: Whether there is a trained factor of all, :attr:`gain`, which starts as 1.
    """

    kind = "diagonal"
    down: Tensor
    up: Tensor
    first: Tensor

    def __init__(self, layout: Layout, rank: int, gained: bool = False) -> None:
        super().__init__(layout, rank)
        *stack, outputs, inputs = layout.matrix_shape
        self.values = nn.Parameter(torch.zeros(*stack, rank))
        self.gain = nn.Parameter(torch.ones(*stack, 1)) if gained else None
        self.register_buffer("first", torch.zeros(*stack, rank))
        self.register_buffer("down", torch.zeros(*stack, rank, inputs))
        self.register_buffer("up", torch.zeros(*stack, outputs, rank))

    def start_as(self, down: Tensor, values: Tensor, up: Tensor) -> None:
        """Set the fixed factors and the first numbers.

        Args:
            down: Shape ``(rank, inputs)``.
            values: Shape ``(rank,)``.
            up: Shape ``(outputs, rank)``.
        """
        with torch.no_grad():
            self.down.copy_(down)
            self.up.copy_(up)
            self.first.copy_(values)
            self.values.copy_(values)

    def factors(self) -> tuple[Tensor, Tensor]:
        values = self.values if self.gain is None else self.gain * self.values
        return self.down * (values - self.first).unsqueeze(-1), self.up

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "gained": self.gain is not None}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, gained: bool = False, **arguments: Any) -> int:
        return layout.matrix_shape[:-2].numel() * (rank + gained)

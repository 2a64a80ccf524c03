"""A small square matrix between two fixed factors: LoRA-XS, LoRA-SB."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout


class CoreForm(FactoredForm):
    """``scale B R A`` with fixed ``A``, shape ``(rank, inputs)``, and ``B``, ``(outputs, rank)``.

    ``R``, :attr:`core`, has shape ``(rank, rank)``.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of ``A``.
        scale: Factor of the product.
    """

    kind = "core"
    down: Tensor
    up: Tensor

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0) -> None:
        super().__init__(layout, rank)
        self.scale = scale
        *stack, outputs, inputs = layout.matrix_shape
        self.core = nn.Parameter(torch.zeros(*stack, rank, rank))
        self.register_buffer("down", torch.zeros(*stack, rank, inputs))
        self.register_buffer("up", torch.zeros(*stack, outputs, rank))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        """Nothing to set: three zero factors add nothing. They are no start to learn from, :meth:`start_as` gives one."""

    def start_as(self, down: Tensor, core: Tensor, up: Tensor) -> None:
        """Set the fixed factors and the first core.

        Args:
            down: Shape ``(rank, inputs)``.
            core: Shape ``(rank, rank)``.
            up: Shape ``(outputs, rank)``.
        """
        with torch.no_grad():
            self.down.copy_(down)
            self.core.copy_(core)
            self.up.copy_(up)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up @ self.core  # so that the frozen side reads the inputs, which need not be kept then

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        return layout.matrix_shape[:-2].numel() * rank**2

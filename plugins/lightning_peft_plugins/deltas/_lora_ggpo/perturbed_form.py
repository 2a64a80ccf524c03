"""A product of thin matrices, and in training steps a random matrix with it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.low_rank_form import LowRankForm


@torch.library.custom_op("lightning_peft::perturbation", mutates_args=())
def perturbation(spread: Tensor, seed: Tensor, inputs: int) -> Tensor:
    """Draw a matrix of normal numbers; an operator, since a compiler traces no generator.

    Args:
        spread: Standard deviations of its rows, shape ``(..., outputs)``.
        seed: What it is drawn from, a whole number, on the CPU.
        inputs: Columns.

    Returns:
        Shape ``(..., outputs, inputs)``. It is as large as a weight, so it is drawn where that is.
    """
    generator = torch.Generator(spread.device).manual_seed(int(seed))
    drawn = torch.randn((*spread.shape, inputs), generator=generator, device=spread.device, dtype=spread.dtype)
    return drawn * spread.unsqueeze(-1)


@perturbation.register_fake
def _(spread: Tensor, seed: Tensor, inputs: int) -> Tensor:
    return spread.new_empty((*spread.shape, inputs))


class PerturbedForm(LowRankForm):
    """``scale B A``, and in training steps a random matrix beside it that is not learnt.

    Attributes:
        spread: Standard deviations of the rows of that matrix, shape ``(outputs,)``; ``None`` outside of training steps.
        seed: What it is drawn from, the same in every call of a step.
    """

    kind = "perturbed"
    beside = "linear"
    reason = "its steps move the weight"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, table: bool = False, taken: int = 0) -> None:
        super().__init__(layout, rank, scale, table, taken)
        self.spread: Tensor | None = None
        self.seed = torch.tensor(0, device="cpu")

    def drawn(self) -> Tensor | None:
        """The random matrix of the step; ``None`` outside of training steps."""
        return None if self.spread is None else perturbation(self.spread, self.seed, self.layout.matrix_shape[-1])

    def of(self, weight: Tensor) -> Tensor:
        whole, drawn = super().of(weight), self.drawn()
        return whole if drawn is None else whole + drawn.to(whole.dtype)

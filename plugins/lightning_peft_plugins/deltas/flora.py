"""FLoRA: a small core tensor, and one thin matrix for every dimension of a weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta


class TuckerForm(FactoredForm):
    """``scale G x_1 U_1 x_2 U_2 ...`` by Tucker's decomposition (Si et al., FLoRA, 2024).

    A linear weight has two dimensions, a convolution one more for every dimension of its kernel. ``G``, :attr:`core`, has shape
    ``(rank, rank, *kernel)``, outputs first and no side above the rank, and starts as zero.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rank of every dimension that is as long.
        scale: Factor of all.
    """

    kind = "tucker"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0) -> None:
        super().__init__(layout, rank)
        self.scale = scale
        stack, sizes = _sizes(layout)
        self.core = nn.Parameter(torch.zeros(*stack, *(min(rank, size) for size in sizes)))
        self.sides = nn.ParameterList(torch.zeros(*stack, size, min(rank, size)) for size in sizes)

    def reset(self, weight: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            self.core.zero_()
            for side in self.sides:  # Kaiming's for a leak of the root of three
                side.normal_(0, math.sqrt(0.5 / side.shape[-1]), generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        up, *inner = self.sides
        down = self.core
        for side in inner:
            down = down.movedim(-len(inner), -1) @ side.mT
        return down.flatten(-len(inner)), up

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        stack, sizes = _sizes(layout)
        ranks = [min(rank, size) for size in sizes]
        return math.prod(stack) * (math.prod(ranks) + sum(a * b for a, b in zip(sizes, ranks, strict=True)))


def _sizes(layout: Layout) -> tuple[list[int], list[int]]:
    """Numbers of matrices, and the sizes that each has: outputs, inputs, kernel."""
    *stack, outputs, _ = layout.matrix_shape
    return stack, [outputs, *layout.input_shape]


class FLoRA(ScaledDelta):
    """FLoRA (Si et al., 2024): a Tucker decomposition, in which a convolution keeps the dimensions of its kernel.

    Args:
        rank: Rank of every dimension, or its size where that is smaller.
        alpha: Numerator of the scale; the rank by default, so that the scale is 1.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> FLoRA(rank=4).scale
        1.0
    """

    slots = Slots(form=("flora",), init=())
    kind = TuckerForm
    paper = "Si et al., FLoRA: Low-Rank Core Space for N-dimension, 2024, arXiv 2405.14739"

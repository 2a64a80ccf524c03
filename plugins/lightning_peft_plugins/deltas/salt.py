"""SALT: large singular values scaled and shifted, the others joined by a low-rank product."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod


class SpectralForm(FactoredForm):
    """``U (diag(gain s + shift) + X Y) V`` in place of ``U diag(s) V``; ``X Y`` has its own singular values (Elsayed et al.).

    Args:
        layout: How the weight is read as a matrix.
        rank: Columns of ``X``.
        top: Singular values that are scaled and shifted, the largest ones.
    """

    kind = "spectral"
    left: Tensor
    first: Tensor
    right: Tensor

    def __init__(self, layout: Layout, rank: int, top: int) -> None:
        super().__init__(layout, rank)
        self.top = top
        *stack, outputs, inputs = layout.matrix_shape
        size = min(outputs, inputs)
        self.gain = nn.Parameter(torch.ones(*stack, top))
        self.shift = nn.Parameter(torch.zeros(*stack, top))
        self.x = nn.Parameter(torch.zeros(*stack, size - top, rank))
        self.y = nn.Parameter(torch.zeros(*stack, rank, size - top))
        self.register_buffer("left", torch.zeros(*stack, outputs, size))
        self.register_buffer("first", torch.zeros(*stack, top))
        self.register_buffer("right", torch.zeros(*stack, size, inputs))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        with torch.no_grad():
            self.left.copy_(left)
            self.right.copy_(right)
            self.first.copy_(values[..., : self.top])
            bound = (6 / 21 / self.rank) ** 0.5  # Kaiming's for a leak of the root of twenty
            self.x.uniform_(-bound, bound, generator=generator)
            self.y.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        top, gained = self.top, (self.gain - 1) * self.first + self.shift
        down = [gained.unsqueeze(-1) * self.right[..., :top, :], self.y @ self.right[..., top:, :]]
        up = [self.left[..., :top], self.left[..., top:] @ self.x]
        return torch.cat(down, -2), torch.cat(up, -1)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "top": self.top}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, top: int = 0, **arguments: Any) -> int:
        return layout.matrix_shape[:-2].numel() * 2 * (top + rank * (layout.largest_rank - top))


class SALT(DeltaMethod):
    """SALT (Elsayed et al., 2025): scale and shift of the largest singular values, a low-rank product among the others.

    Args:
        rank: Rank of the product.
        share: Share of the singular values that are scaled and shifted, at least one.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: Also for a share that leaves nothing to one of the two.

    Example:
        >>> SALT(rank=4, share=0.2).share
        0.2
    """

    slots = Slots(form=("salt",), init=())
    kind = SpectralForm
    paper = "Elsayed et al., SALT: Singular Value Adaptation with Low-Rank Transformation, 2025, arXiv 2503.16055"

    def __init__(self, rank: int = 8, share: float = 0.1, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)
        if not 0 < share < 1:
            raise MisconfigurationException(f"share={share} must lie between 0 and 1. SVFit trains singular values alone.")
        self.share = share

    def arguments(self, place: Place) -> dict[str, Any]:
        return {"rank": self.rank, "top": max(1, int(place.layout.largest_rank * self.share))}

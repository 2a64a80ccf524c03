"""A direction and a length for every output: DoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.low_rank_form import LowRankForm

_LEAST = 1e-30  # a row of zeros has the length zero, and stays


class DecomposedForm(LowRankForm):
    """``m (W + scale B A) / |W + scale B A|``, row by row (Liu et al., DoRA, ICML 2024, arXiv 2402.09353, equations 5 and 11).

    The norm is a constant for the gradient, as in section 4.3. The lengths ``m``, :attr:`magnitude`, have shape ``(outputs,)``
    and start as the norms of the frozen rows.
    """

    kind = "decomposed"
    beside = "linear"
    reason = "its rows are scaled"
    tables = False  # lengths belong to outputs, and the rows of a table are none

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, table: bool = False, taken: int = 0) -> None:
        super().__init__(layout, rank, scale, table, taken)
        self.magnitude = nn.Parameter(torch.ones(self.up.shape[:-1]))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        super().reset(weight, generator)
        with torch.no_grad():
            self.magnitude.copy_(weight.to(self.magnitude.dtype).norm(dim=-1))

    def factor(self, weight: Tensor) -> Tensor:
        """Return ``m / |W + scale B A|`` for each row without making the sum: ``|W|^2 + 2 scale W.BA + scale^2 |BA|^2``.

        Args:
            weight: The frozen weight, as a matrix.
        """
        with torch.no_grad():
            (down, up), weight = self.factors(), weight.to(self.up.dtype)
            beside = (weight @ down.mT * up).sum(-1)
            own = (up @ (down @ down.mT) * up).sum(-1)
            norm = (weight.square().sum(-1) + 2 * self.scale * beside + self.scale**2 * own).clamp_min(0).sqrt()
        return self.magnitude / norm.clamp_min(_LEAST)

    def of(self, weight: Tensor) -> Tensor:
        whole = weight + self.delta().to(weight.dtype)
        norm: Tensor = whole.detach().to(self.magnitude.dtype).norm(dim=-1).clamp_min(_LEAST)
        return whole * (self.magnitude / norm).to(weight.dtype).unsqueeze(-1)

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        return super().trainable(layout, rank) + layout.matrix_shape[:-1].numel()

"""RandLoRA: many random products of low rank, scaled by trained diagonals to one of full rank."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta


class ScaledBasesForm(FactoredForm):
    """``scale sum_k B_k L_k A G_k`` with random ``A`` and ``B_k`` (Albert et al., RandLoRA, ICLR 2025).

    As many products as make up the smaller side of the weight. ``L``, :attr:`inner`, has shape ``(rank, products)`` and starts
    as zero; ``G``, :attr:`outer`, ``(products, smaller side)`` and starts as one over its longer side. The random matrices come
    from a seed, are the same for all weights of one shape, and are in no file, unless others are given.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rank of one product.
        scale: Factor of the sum.
        seed: What the random matrices are drawn from.
        given: Whether they come from elsewhere instead, by :meth:`set_bases`; files have them then.
    """

    kind = "scaled_bases"
    small: Tensor
    large: Tensor

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, seed: int = 0, given: bool = False) -> None:
        super().__init__(layout, rank)
        self.scale, self.seed, self.given = scale, seed, given
        *stack, outputs, inputs = layout.matrix_shape
        sides = sorted((outputs, inputs))
        products = -(-sides[0] // rank)
        self.inner = nn.Parameter(torch.zeros(*stack, rank, products))
        self.outer = nn.Parameter(torch.full((*stack, products, sides[0]), 1 / max(products, sides[0])))
        shapes = (rank, 1, sides[0]), (sides[1], rank * products)
        bases = map(torch.zeros, shapes) if given else _drawn(rank, products, *sides, seed)
        for name, values in zip(("small", "large"), bases, strict=True):
            self.register_buffer(name, values.to(self.inner.device), persistent=given)

    @property
    def peft(self) -> str:
        return "RANDLORA"

    def set_bases(self, small: Tensor, large: Tensor) -> None:
        """Give it other random matrices.

        Args:
            small: ``A``, shape ``(rank, 1, smaller side)``.
            large: Every ``B_k``, side by side, shape ``(larger side, products * rank)``.
        """
        self.small.copy_(small)
        self.large.copy_(large)

    def reset(self, weight: Tensor, generator: Generator) -> None:
        """Nothing to draw: the diagonals start as they are made, and the bases are the seed's."""

    def factors(self) -> tuple[Tensor, Tensor]:
        # (rank, products, smaller side), then one row for every pair of the first two
        scaled = (self.inner.unsqueeze(-1) * self.small * self.outer.unsqueeze(-3)).flatten(-3, -2)
        outputs, inputs = self.layout.matrix_shape[-2:]
        if inputs <= outputs:
            return scaled, self.large.expand(*scaled.shape[:-2], -1, -1)
        return self.large.T.expand(*scaled.shape[:-2], -1, -1), scaled.mT

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "seed": self.seed, "given": self.given}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        smaller = min(outputs, inputs)
        return math.prod(stack) * -(-smaller // rank) * (rank + smaller)


@lru_cache(maxsize=16)
def _drawn(rank: int, products: int, smaller: int, larger: int, seed: int) -> tuple[Tensor, Tensor]:
    """``A``, shape ``(rank, 1, smaller)``, and ``B``, ``(larger, rank * products)``, of unit variance; never written to."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        small = torch.rand(rank, 1, smaller, generator=generator) * 2 - 1
        large = torch.rand(larger, rank * products, generator=generator) * 2 - 1
        return small / small.std(), large / large.std()


class RandLoRA(ScaledDelta):
    """RandLoRA (Albert et al., 2025): an update of full rank, of which only diagonals are trained.

    Args:
        rank: Rank of one random product: the larger, the fewer parameters.
        alpha: Numerator of the scale.
        seed: What the random matrices are drawn from; not the seed of the training, which may be another when it resumes.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> RandLoRA(rank=32).scale
        20.0
    """

    slots = Slots(form=("randlora",), init=())
    kind = ScaledBasesForm
    paper = "Albert et al., RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models, ICLR 2025, arXiv 2502.00987"

    def __init__(self, rank: int = 32, alpha: float = 640, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(rank, alpha, **kwargs)
        self.seed = seed

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"seed": self.seed}

"""NOLA: factors that are sums of random matrices, of which only the weights are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.arguments import positive
from lightning_peft.contract import SHARDED
from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft.network.seeds import name_hash
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta

_LARGEST = 2**31  # numbers in the bases of one weight


class BasisForm(FactoredForm):
    """``scale (sum_j b_j B_j) (A_0 + sum_i a_i A_i)`` (Koohpayegani et al., NOLA, ICLR 2024).

    The bases come from a seed on the CPU, whatever device they are used on, and are in no file. ``a``, :attr:`of_down`, and
    ``b``, :attr:`of_up`, have shape ``(bases,)`` and start as zero.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of every ``A_i``.
        scale: Factor of the product.
        bases: Matrices that each factor is a sum of.
        seed: What they are drawn from.
    """

    kind = "bases"
    down: Tensor
    up: Tensor
    first: Tensor

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, bases: int = 256, seed: int = 0) -> None:
        super().__init__(layout, rank)
        self.scale, self.bases, self.seed = scale, bases, seed
        *stack, outputs, inputs = layout.matrix_shape
        shapes = [(bases, *stack, rank, inputs), (bases, *stack, outputs, rank), (*stack, rank, inputs)]
        if sum(map(math.prod, shapes)) > _LARGEST:
            raise ValueError(f"{bases} bases of rank {rank} are too many for a weight of shape {tuple(layout.shape)}")
        self.of_down = nn.Parameter(torch.zeros(bases))
        self.of_up = nn.Parameter(torch.zeros(bases))
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(seed)
            bounds = [1 / math.sqrt(bases), 1 / math.sqrt(bases), 1 / math.sqrt(inputs)]
            drawn = [torch.rand(shape, generator=generator) * 2 * b - b for shape, b in zip(shapes, bounds, strict=True)]
        for name, values in zip(("down", "up", "first"), drawn, strict=True):
            self.register_buffer(name, values.to(self.of_down.device), persistent=False)

    def reset(self, weight: Tensor, generator: Generator) -> None:
        """Nothing to draw: the coefficients start as zero, and the bases are the seed's."""

    def factors(self) -> tuple[Tensor, Tensor]:
        down = self.first + torch.tensordot(self.of_down, self.down, 1)
        return down, torch.tensordot(self.of_up, self.up, 1)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "bases": self.bases, "seed": self.seed}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, bases: int = 0, **arguments: Any) -> int:
        return 2 * bases


class NOLA(ScaledDelta):
    """NOLA (Koohpayegani et al., 2024): trains how random matrices are mixed to the two factors; the rank costs nothing.

    The bases take ``bases * rank * (inputs + outputs)`` numbers of memory for each weight, and are in no file.

    Args:
        rank: Rank of the product.
        alpha: Numerator of the scale.
        bases: Random matrices that each factor is a sum of.
        seed: What they are drawn from, for each weight its own; not that of the training, which may be another when it resumes.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> NOLA(rank=4, bases=64).bases
        64
    """

    slots = Slots(form=("nola",), init=())
    strategies = SHARDED  # torch flattens no matrix whose rows do not divide among processes
    kind = BasisForm
    paper = "Koohpayegani et al., NOLA: Compressing LoRA using Linear Combination of Random Basis, ICLR 2024, arXiv 2310.02556"

    def __init__(self, rank: int = 8, alpha: float | None = None, bases: int = 256, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(rank, alpha, **kwargs)
        positive("bases", bases)
        self.bases, self.seed = bases, seed

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"bases": self.bases, "seed": self.seed ^ name_hash(place.tensor)}

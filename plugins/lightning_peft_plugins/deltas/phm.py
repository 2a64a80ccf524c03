"""PHM: Kronecker products of small squares with thin products, as in Compacter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.arguments import positive
from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod
from lightning_peft_plugins.deltas._shared.dividing import check_divides


class HypercomplexForm(FactoredForm):
    """``sum_i A_i (x) (s_i t_i)`` over ``n`` terms (Karimi Mahabadi et al., Compacter, NeurIPS 2021).

    ``A``, :attr:`squares`, has shape ``(n, n, n)``; ``s``, :attr:`up`, ``(n, outputs / n, rank)`` and starts as zero; ``t``,
    :attr:`down`, ``(n, rank, inputs / n)``.

    Args:
        layout: How the weight is read as a matrix.
        rank: Columns of every ``s_i``.
        terms: ``n``; it divides both sides of the weight.
    """

    kind = "hypercomplex"

    def __init__(self, layout: Layout, rank: int, terms: int) -> None:
        super().__init__(layout, rank)
        self.terms = terms
        *stack, outputs, inputs = layout.matrix_shape
        self.squares = nn.Parameter(torch.zeros(*stack, terms, terms, terms))
        self.up = nn.Parameter(torch.zeros(*stack, terms, outputs // terms, rank))
        self.down = nn.Parameter(torch.zeros(*stack, terms, rank, inputs // terms))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        bound = math.sqrt(2) * math.sqrt(6 / sum(self.down.shape[-2:]))  # Glorot's, with the gain of a rectifier
        with torch.no_grad():
            self.squares.normal_(0, 0.01, generator=generator)
            self.down.uniform_(-bound, bound, generator=generator)
            self.up.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        # A (x) (s t) = (A (x) s) (1 (x) t): thin, with `terms` squared times `rank` columns in all
        up = torch.einsum("...iab,...ior->...aoibr", self.squares, self.up)
        eye = torch.eye(self.terms, dtype=self.down.dtype, device=self.down.device)
        down = torch.einsum("ab,...irc->...iarbc", eye, self.down)
        ranks = self.terms**2 * self.rank
        *stack, outputs, inputs = self.layout.matrix_shape
        return down.reshape(*stack, ranks, inputs), up.reshape(*stack, outputs, ranks)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "terms": self.terms}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, terms: int = 0, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        return math.prod(stack) * (terms**3 + rank * (outputs + inputs))


class PHM(DeltaMethod):
    """The weights of Compacter's layers (Karimi Mahabadi et al., 2021) as a delta: ``W + sum_i A_i (x) (s_i t_i)``.

    Args:
        rank: Rank of every ``s_i t_i``.
        terms: Number of terms, and side of the squares ``A_i``; it divides both sides of every weight.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: Also for a weight that does not divide.

    Example:
        >>> PHM(terms=2).terms
        2
    """

    slots = Slots(form=("phm",), init=())
    kind = HypercomplexForm
    paper = "Karimi Mahabadi et al., Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, NeurIPS 2021, arXiv 2106.04647"

    def __init__(self, rank: int = 1, terms: int = 4, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)
        positive("terms", terms)
        self.terms = terms

    def arguments(self, place: Place) -> dict[str, Any]:
        return {"rank": self.rank, "terms": self.terms}

    def _check(self, found: Sequence[Place]) -> None:
        super()._check(found)
        check_divides(found, "terms", self.terms, "LoRA")

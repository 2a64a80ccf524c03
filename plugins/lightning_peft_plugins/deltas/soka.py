"""SoKA: the principal Kronecker products of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor, nn

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod


class KroneckerForm(Form):
    """``sum_i A_i (x) B_i`` less what it began as: the terms of the largest singular values of the rearranged weight.

    ``A``, :attr:`outer`, has shape ``(rank, a, b)`` and ``B``, :attr:`inner`, ``(rank, outputs / a, inputs / b)``. ``a`` and
    ``b`` are the largest divisors of both sides that are no larger than their roots.
    """

    kind = "kronecker"
    first_outer: Tensor
    first_inner: Tensor

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__(layout, rank)
        stack, (a, b), (c, d) = blocks(layout)
        self.outer = nn.Parameter(torch.zeros(*stack, rank, a, b))
        self.inner = nn.Parameter(torch.zeros(*stack, rank, c, d))
        self.register_buffer("first_outer", torch.zeros(*stack, rank, a, b))
        self.register_buffer("first_inner", torch.zeros(*stack, rank, c, d))

    def reset(self, weight: Tensor, generator: Generator) -> None:
        _, (a, b), (c, d) = blocks(self.layout)
        left, values, right = torch.linalg.svd(rearranged(weight, a, b), full_matrices=False)
        root = values[..., : self.rank].sqrt()
        with torch.no_grad():
            self.outer.copy_((left[..., : self.rank] * root.unsqueeze(-2)).mT.unflatten(-1, (a, b)))
            self.inner.copy_((root.unsqueeze(-1) * right[..., : self.rank, :]).unflatten(-1, (c, d)))
            self.first_outer.copy_(self.outer)
            self.first_inner.copy_(self.inner)

    def delta(self) -> Tensor:
        return _added(self.outer, self.inner) - _added(self.first_outer, self.first_inner)

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        stack, outer, inner = blocks(layout)
        return math.prod(stack) * rank * (math.prod(outer) + math.prod(inner))


def blocks(layout: Layout) -> tuple[list[int], tuple[int, int], tuple[int, int]]:
    """Numbers of matrices, and the shapes of both factors of a Kronecker product that is as large as one."""
    *stack, outputs, inputs = layout.matrix_shape
    a, b = _divisor(outputs), _divisor(inputs)
    return stack, (a, b), (outputs // a, inputs // b)


def _divisor(size: int) -> int:
    """The largest divisor that is no larger than the root."""
    return next(part for part in range(math.isqrt(size), 0, -1) if size % part == 0)


def rearranged(weight: Tensor, a: int, b: int) -> Tensor:
    """Rearrange a matrix so that Kronecker products become products of two vectors (Van Loan and Pitsianis, 1993).

    Args:
        weight: Shape ``(a c, b d)``.
        a: Rows of the left factor.
        b: Its columns.

    Returns:
        Shape ``(a b, c d)``.

    Example:
        >>> left, right = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
        >>> rearranged(torch.kron(left, right), 1, 2)
        tensor([[3., 4.],
                [6., 8.]])
    """
    *stack, outputs, inputs = weight.shape
    cut = weight.reshape(*stack, a, outputs // a, b, inputs // b).transpose(-3, -2)
    return cut.reshape(*stack, a * b, -1)


def _added(outer: Tensor, inner: Tensor) -> Tensor:
    added = torch.einsum("...rab,...rcd->...acbd", outer, inner)
    return added.flatten(-4, -3).flatten(-2)


class SoKA(DeltaMethod):
    """SoKA (Chong et al., 2025): trains the first terms of a weight's Kronecker decomposition; the rest is frozen.

    A sum of Kronecker products has full rank, so it acts on the weight.

    Args:
        rank: Terms to train.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Example:
        >>> SoKA(rank=4)
        SoKA(rank=4, tune=(), ...)
    """

    slots = Slots(form=("soka",), init=())
    kind = KroneckerForm
    fixed_arguments = frozenset({"dropout"})
    paper = "Chong et al., Singular Value Decomposition on Kronecker Adaptation for LLMs, 2025, arXiv 2506.15251"

    def _check(self, found: Sequence[Place]) -> None:
        super()._check(found)
        for place in found:
            _, outer, inner = blocks(place.layout)
            if self.rank > (most := min(math.prod(outer), math.prod(inner))):
                raise MisconfigurationException(
                    f"rank={self.rank} is above the {most} Kronecker products that {place.tensor}, "
                    f"{tuple(place.layout.matrix_shape)}, is a sum of. Give at most rank={most}, or leave the layer out: "
                    f"exclude=[{place.path!r}] beside what is excluded now."
                )

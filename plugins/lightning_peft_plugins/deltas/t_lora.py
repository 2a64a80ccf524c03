"""TLoRA: the inputs of a weight are transformed, and a residual is added, both made of rings of small tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor, nn

from lightning_peft import Step
from lightning_peft.arguments import not_negative, positive
from lightning_peft.deltas.form import LARGEST, Form
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod

_MOST = 8


class RingForm(Form):
    """``W T + R`` (Tao et al., TLoRA, ICCV 2025, arXiv 2501.08727, section 3).

    Inputs and outputs are counted by ``factors`` indices each, of which the last one runs fastest. An entry of ``T``, shape
    ``(inputs, inputs)``, is the trace of a product of matrices, one for each pair of indices from :attr:`transform`, whose
    shapes are ``(n, n, transform_rank, transform_rank)``. An entry of ``R``, shape ``(outputs, inputs)``, is that of one matrix
    for each index, from :attr:`rows` and :attr:`columns`, whose shapes are ``(n, rank, rank)``. ``T`` starts as the identity,
    ``R`` as zero.

    Args:
        layout: How the weight is read as a matrix.
        rank: Side of the matrices of ``R``, whose rank as a matrix is at most the square of it.
        transform_rank: Side of the matrices of ``T``.
        factors: Indices of each side, 2 to 8.
    """

    kind = "ring"

    def __init__(self, layout: Layout, rank: int, transform_rank: int = 1, factors: int = 2) -> None:
        super().__init__(layout, rank)
        self.transform_rank, self.factors = transform_rank, factors
        *stack, outputs, inputs = layout.matrix_shape
        self.sizes = indices(inputs, factors)
        of_transform, of_residual = (transform_rank, transform_rank), (rank, rank)
        self.transform = nn.ParameterList(torch.zeros(*stack, n, n, *of_transform) for n in self.sizes)
        self.rows = nn.ParameterList(torch.zeros(*stack, n, *of_residual) for n in indices(outputs, factors))
        self.columns = nn.ParameterList(torch.zeros(*stack, n, *of_residual) for n in self.sizes)

    def reset(self, weight: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            for core in self.transform:
                core.copy_(_of_identity(core))
            for core in (*self.rows, *self.columns):  # the spectral scale of a layer from n rank inputs to rank outputs
                core.normal_(0, 1 / (core.shape[-3] * math.sqrt(self.rank)), generator=generator)
            self.rows[0].zero_()

    def made_transform(self) -> Tensor:
        """``T``, shape ``(inputs, inputs)``."""
        entries = ring([core.flatten(-4, -3) for core in self.transform]).flatten(-2)
        stack, count = entries.shape[:-1], len(self.sizes)
        cut = entries.view(*stack, *(n for n in self.sizes for _ in range(2)))  # the indices of both sides in turns
        order = [len(stack) + 2 * place + side for side in range(2) for place in range(count)]
        whole = math.prod(self.sizes)
        return cut.permute(*range(len(stack)), *order).reshape(*stack, whole, whole)

    def residual(self) -> Tensor:
        """``R``, shape ``(outputs, inputs)``."""
        return ring([*self.rows, *self.columns])

    def of(self, weight: Tensor) -> Tensor:
        made = weight.to(self.rows[0].dtype) @ self.made_transform() + self.residual()
        return made.to(weight.dtype)

    def gap(self) -> Tensor:
        """Distance of ``T`` from the identity: ``sum |A[:, :, r, s] - I / transform_rank|`` over all matrices of the ring."""
        gaps = [torch.linalg.matrix_norm(core - _of_identity(core), dim=(-4, -3)).sum() for core in self.transform]
        return torch.stack(gaps).sum()

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "transform_rank": self.transform_rank, "factors": self.factors}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, transform_rank: int = 1, factors: int = 2, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        beside, below = indices(inputs, factors), indices(outputs, factors)
        squares = transform_rank**2 * sum(n * n for n in beside)
        return math.prod(stack) * (squares + rank**2 * (sum(beside) + sum(below)))


def _of_identity(core: Tensor) -> Tensor:
    """What a tensor of the transform is where that is the identity (proposition 1): ``I / rank`` at every place of the ring."""
    eye = torch.eye(core.shape[-4], dtype=core.dtype, device=core.device) / core.shape[-1]
    return eye[..., None, None].expand_as(core)


def indices(side: int, count: int) -> list[int]:
    """Split a side into sizes whose product it is, as equal as its divisors allow, smaller ones first.

    Raises:
        ValueError: There are to be fewer than two, or more than eight.

    Example:
        >>> indices(768, 3), indices(7, 2)
        ([8, 8, 12], [1, 7])
    """
    if not 2 <= count <= _MOST:  # a file may say anything
        raise ValueError(f"a ring has 2 to {_MOST} factors for a side, not {count}")
    sizes = []
    for left in range(count, 1, -1):
        sizes.append(max(n for n in range(1, math.isqrt(side) + 1) if side % n == 0 and n**left <= side))
        side //= sizes[-1]
    return sorted([*sizes, side])


def ring(cores: Sequence[Tensor]) -> Tensor:
    """Compute all entries of a tensor ring: traces of products, with one matrix from each tensor (Zhao et al., 2016).

    Args:
        cores: An even number of tensors, at least two, each of shape ``(..., n, rank, rank)`` with its own ``n``.

    Returns:
        Shape ``(..., rows, columns)``: rows count the choices in the first half of the tensors, columns those in the second,
        the last index fastest.

    Example:
        >>> ring([torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[5.0]], [[7.0]]])])
        tensor([[10., 14.],
                [15., 21.]])
    """
    half = len(cores) // 2
    first, second = _chained(cores[:half]), _chained(cores[half:])
    return first.flatten(-2) @ second.mT.flatten(-2).mT


def _chained(cores: Sequence[Tensor]) -> Tensor:
    """Products of one matrix from each tensor."""
    made = cores[0]
    for core in cores[1:]:
        made = (made.unsqueeze(-3) @ core.unsqueeze(-4)).flatten(-4, -3)
    return made


class TLoRA(DeltaMethod):
    """TLoRA (Tao et al., 2025): a weight's inputs pass a trained transform of full rank, and a small residual is added.

    ``W T + R`` is no sum with a product of thin matrices, so it acts on the weight.

    Args:
        rank: Rank of the tensor ring of the residual.
        transform_rank: That of the transform.
        factors: Tensors of the transform, and of either side of the residual, 2 to 8; more make them smaller.
        gamma: Weight of the penalty that holds the transform near the identity, the mean over the weights.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: Also for a weight whose sides have so few divisors that the tensors would be far larger.

    Example:
        >>> TLoRA(rank=4).transform_rank
        2
    """

    slots = Slots(form=("tlora",), init=())
    kind = RingForm
    fixed_arguments = frozenset({"dropout"})
    paper = (
        "Tao et al., Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models, "
        "ICCV 2025, arXiv 2501.08727"
    )

    def __init__(self, rank: int = 6, transform_rank: int = 2, factors: int = 3, gamma: float = 0.0, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)
        positive("transform_rank", transform_rank)
        if not 2 <= factors <= _MOST:
            raise MisconfigurationException(f"factors={factors} must be 2 to {_MOST}: a ring has so many tensors for a side.")
        not_negative("gamma", gamma, "Zero leaves the penalty out.")
        self.transform_rank, self.factors, self.gamma = transform_rank, factors, gamma

    def arguments(self, place: Place) -> dict[str, Any]:
        return {"rank": self.rank, "transform_rank": self.transform_rank, "factors": self.factors}

    def _check(self, found: Sequence[Place]) -> None:
        super()._check(found)
        sizes = [self.kind.trainable(place.layout, **self.arguments(place)) for place in found]
        if odd := [place for place, size in zip(found, sizes, strict=True) if size > LARGEST * place.layout.shape.numel()]:
            raise MisconfigurationException(
                f"The sides of {odd[0].tensor}, {tuple(odd[0].layout.matrix_shape)}, have so few divisors that the tensors "
                f"would be over {LARGEST} times as large as the weight. Give a smaller transform_rank= and rank=, or leave the "
                f"layer out: exclude={[place.path for place in odd]!r} beside what is excluded now."
            )

    def loss(self, step: Step) -> Tensor | None:
        if not self.gamma:
            return None
        gaps = [form.gap() for _, form in self.forms(step.run.module)]
        return self.gamma * torch.stack(gaps).mean()

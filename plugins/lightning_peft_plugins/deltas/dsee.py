"""DSEE: a product of low rank, and values where the weight stands out from one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.arguments import positive
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta
from lightning_peft_plugins.deltas.functional.dsee import sparse_support


class SparseLowRankForm(Form):
    """``scale B A + S``, with ``S`` zero but at few entries (Chen et al., DSEE, ACL 2023, arXiv 2111.00160, section 3).

    ``A``, :attr:`down`, has shape ``(rank, inputs)``, ``B``, :attr:`up`, ``(outputs, rank)``, and the entries of ``S``,
    :attr:`values`, ``(sparse,)``; all have the number of matrices before it in a stack. A matrix with fewer entries has values
    at all of them.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of ``A``.
        scale: Factor of the product.
        sparse: Entries of ``S``.

    Attributes:
        indices: Their places in the flattened matrix, ascending; no buffer, for averages would change them.
    """

    kind = "sparse_low_rank"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, sparse: int = 128) -> None:
        super().__init__(layout, rank)
        self.scale, self.sparse = scale, sparse
        *stack, outputs, inputs = layout.matrix_shape
        count = min(sparse, outputs * inputs)
        self.down = nn.Parameter(torch.zeros(*stack, rank, inputs))
        self.up = nn.Parameter(torch.zeros(*stack, outputs, rank))
        self.values = nn.Parameter(torch.zeros(*stack, count))
        self.indices = torch.arange(count).expand(*stack, count).clone()

    def reset(self, weight: Tensor, generator: Generator) -> None:
        bound = 1 / math.sqrt(weight.shape[-1])
        with torch.no_grad():
            self.down.uniform_(-bound, bound, generator=generator)
            self.up.zero_()
            self.values.zero_()

    def find_support(self, weight: Tensor, generator: Generator) -> None:
        """Let values stand where the weight, a matrix or a stack of them, stands out from one of low rank."""
        count = self.values.shape[-1]
        found = [sparse_support(matrix, count, generator) for matrix in weight.reshape(-1, *weight.shape[-2:])]
        self.indices = torch.stack(found).view_as(self.values).to(self.values.device)

    def delta(self) -> Tensor:
        product = (self.scale * (self.up @ self.down)).to(self.values.dtype)  # autocast multiplies in half precision
        return product.flatten(-2).scatter_add(-1, self.indices, self.values).view_as(product)

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "sparse": self.sparse}

    def get_extra_state(self) -> Tensor:
        return self.indices

    def set_extra_state(self, state: Tensor) -> None:
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != self.values.shape:
            raise ValueError("the saved places are not as many whole numbers as there are values")
        size = self.layout.matrix_shape[-2:].numel()
        if not bool(((state >= 0) & (state < size)).all()) or not bool((state.diff() > 0).all()):
            raise ValueError("the saved places do not ascend within the weight")
        self.indices = state.to(self.values.device).clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLowRankForm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.indices = fn(self.indices)
        return self

    @classmethod
    def trainable(cls, layout: Layout, rank: int, *, sparse: int = 128, **arguments: Any) -> int:
        *stack, outputs, inputs = layout.matrix_shape
        return math.prod(stack) * (rank * (outputs + inputs) + min(sparse, outputs * inputs))


class DSEE(ScaledDelta):
    """DSEE (Chen et al., 2023): LoRA, and values at the entries of a weight that stand out from a matrix of low rank.

    The entries are found in the frozen weights when the fit begins, and stay. A pruning method beside it makes the weights
    sparse too, the second sparsity of the paper; the mask then acts on the sum.

    Args:
        rank: Rank of the product.
        alpha: Numerator of its scale.
        sparse: Values of each weight.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.scaled_delta.ScaledDelta`.

    Example:
        >>> DSEE(rank=4, alpha=32, sparse=64).sparse
        64
    """

    slots = Slots(form=("dsee",), init=())
    kind = SparseLowRankForm
    paper = (
        "Chen et al., DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, ACL 2023, "
        "arXiv 2111.00160"
    )

    def __init__(self, rank: int = 8, alpha: float | None = None, sparse: int = 128, **kwargs: Any) -> None:
        super().__init__(rank, alpha, **kwargs)
        positive("sparse", sparse)
        self.sparse = sparse

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"sparse": self.sparse}

    def begin(self, form: SparseLowRankForm, weight: Tensor, generator: Generator) -> None:
        super().begin(form, weight, generator)
        if self.fits:  # in an evaluation a checkpoint brings the places along
            form.find_support(weight, generator)

"""Bone: blocks of a weight, each moved by a square matrix that its row of blocks shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod
from lightning_peft_plugins.deltas._shared.dividing import check_divides


class BlockForm(Form):
    """``W' = W + W M + M`` block by block, with blocks of ``rank`` by ``rank`` (Kang, Bone, 2024, the variant called Bat).

    ``M``, :attr:`blocks`, has one square for each row of blocks, shape ``(outputs / rank, rank, rank)``, and starts as zero.
    """

    kind = "blocks"

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__(layout, rank)
        *stack, outputs, _ = layout.matrix_shape
        self.blocks = nn.Parameter(torch.zeros(*stack, outputs // rank, rank, rank))

    @property
    def peft(self) -> str:
        return "MISS.bat"

    def reset(self, weight: Tensor, generator: Generator) -> None:
        nn.init.zeros_(self.blocks)

    def of(self, weight: Tensor) -> Tensor:
        rank, blocks = self.rank, self.blocks.to(weight.dtype).unsqueeze(-4)
        *stack, outputs, inputs = weight.shape
        cut = weight.reshape(*stack, outputs // rank, rank, inputs // rank, rank).movedim(-2, -4)
        moved = cut + cut @ blocks + blocks
        return moved.movedim(-4, -2).reshape(weight.shape)

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        return layout.matrix_shape[:-1].numel() * rank


class Bone(DeltaMethod):
    """Bone (Kang, 2024) in its weight-guided form: what a block gains depends on the block.

    It is no product of thin matrices, so it acts on the weight. :class:`MiSS` is the form that does not.

    Args:
        rank: Side of the blocks; it divides both sides of every weight.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: Also for a weight that has no such blocks.

    Example:
        >>> Bone(rank=16)
        Bone(rank=16, tune=(), ...)
    """

    slots = Slots(form=("bone",), init=())
    kind = BlockForm
    fixed_arguments = frozenset({"dropout"})
    paper = "Kang, Bone: Block-Affine Adaptation of Large Language Models, 2024, arXiv 2409.15371 (first version)"

    def __init__(self, rank: int = 16, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)

    def _check(self, found: Sequence[Place]) -> None:
        super()._check(found)
        check_divides(found, "rank", self.rank, "MiSS")

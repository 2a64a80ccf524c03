"""MiSS: one thin matrix for groups of inputs that share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_peft.contract import SHARDED
from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod


class SharedForm(FactoredForm):
    """``B A`` in which ``A`` only adds up inputs: column ``j`` of the delta is column ``j mod rank`` of ``B``.

    ``B``, :attr:`up`, has shape ``(outputs, rank)`` and starts as zero (Kang and Yin, MiSS, 2024).
    """

    kind = "shared"

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__(layout, rank)
        *stack, outputs, _ = layout.matrix_shape
        self.up = nn.Parameter(torch.zeros(*stack, outputs, rank))

    @property
    def peft(self) -> str:
        return "MISS"

    def reset(self, weight: Tensor, generator: Generator) -> None:
        nn.init.zeros_(self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        inputs = self.layout.matrix_shape[-1]
        groups = -(-inputs // self.rank)
        down = torch.eye(self.rank, dtype=self.up.dtype, device=self.up.device).repeat(1, groups)[:, :inputs]
        return down.expand(*self.up.shape[:-2], -1, -1), self.up

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        return layout.matrix_shape[:-1].numel() * rank


class MiSS(DeltaMethod):
    """MiSS (Kang and Yin, 2024), the later form of Bone: every ``rank``-th column of a weight gains the same.

    Args:
        rank: Columns that differ.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Example:
        >>> MiSS(rank=16)
        MiSS(rank=16, dropout=0.0, ...)
    """

    slots = Slots(form=("miss",), init=())
    strategies = SHARDED  # one of its factors is no parameter
    kind = SharedForm
    paper = (
        "Kang, Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, 2024, arXiv 2409.15371"
    )

    def __init__(self, rank: int = 16, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)

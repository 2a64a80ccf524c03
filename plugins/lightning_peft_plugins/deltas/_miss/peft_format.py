"""MiSS in folders of PEFT: the thin matrix, as it is or shared by outputs too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.peft_format import Adapted, PeftFormat, Target, check_linear, check_rank, check_shapes, one_rank
from lightning_peft_plugins.deltas.miss import SharedForm

BLOCK = "miss_block"


class MissFormat(PeftFormat):
    """``miss_block``, the transposed of :class:`~lightning_peft_plugins.deltas.miss.SharedForm`'s matrix."""

    peft_type = "MISS"
    owner = "MiSS"
    beginning = "miss_"
    tensors = (frozenset({BLOCK}),)
    settings = frozenset({"r", "init_weights", "mini_r"})
    dropout = "miss_dropout"

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Form:
        block = tensors[BLOCK]
        rank = len(block) if block.ndim == 2 else 0
        check_rank(target, rank)
        check_shapes(target, tensors, {BLOCK: (rank, target.layout.matrix_shape[0])})
        form = SharedForm(target.layout, rank)
        with torch.no_grad():
            form.up.copy_(block.T)
        return form

    def written(self, adapted: Sequence[Adapted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        check_linear(adapted, self.owner)
        tensors = {f"{each.name}.{BLOCK}": each.form.share * each.form.up.T for each in adapted}
        return tensors, {"r": one_rank(adapted), "init_weights": True}


class MiniFormat(MissFormat):
    """The variant ``mini``, whose outputs share the matrix too; it is read as a MiSS that repeats it, and trained on as one."""

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Form:
        block, outputs = tensors[BLOCK], target.layout.matrix_shape[0]
        width = block.shape[-1] if block.ndim == 2 else 0
        if width and outputs % width == 0:
            block = block.repeat(1, outputs // width)
        return super().form(target, {BLOCK: block}, config)

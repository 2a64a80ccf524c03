"""Bone in folders of PEFT: the variant ``bat`` of MiSS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.peft_format import Adapted, Target, check_linear, check_rank, check_shapes, one_rank
from lightning_peft_plugins.deltas._miss.peft_format import BLOCK, MissFormat
from lightning_peft_plugins.deltas.bone import BlockForm


class BoneFormat(MissFormat):
    """``miss_block``, the squares of :class:`~lightning_peft_plugins.deltas.bone.BlockForm`."""

    owner = "Bone"

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Form:
        blocks = tensors[BLOCK]
        outputs, inputs = target.layout.matrix_shape
        rank = blocks.shape[-1] if blocks.ndim == 3 else 0
        check_rank(target, 0 if rank and (outputs % rank or inputs % rank) else rank)
        check_shapes(target, tensors, {BLOCK: (outputs // rank, rank, rank)})
        form = BlockForm(target.layout, rank)
        with torch.no_grad():
            form.blocks.copy_(blocks)
        return form

    def written(self, adapted: Sequence[Adapted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        check_linear(adapted, self.owner)
        tensors = {f"{each.name}.{BLOCK}": each.form.blocks for each in adapted}
        return tensors, {"r": one_rank(adapted), "init_weights": "bat"}

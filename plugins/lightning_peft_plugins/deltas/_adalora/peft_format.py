"""AdaLoRA in folders of PEFT: triplets, as many as each weight was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.peft_format import Adapted, PeftFormat, Target, check_linear, check_rank, check_shapes, number
from lightning_peft_plugins.deltas._shared.triplet_form import TripletForm

_A, _E, _B = "lora_A", "lora_E", "lora_B"
_LEAST = 1e-5  # added to the rank under the scale, as PEFT does


class AdaLoraFormat(PeftFormat):
    """``lora_A``, ``lora_E``, ``lora_B``; all weights have the scale of the rank that they began with."""

    peft_type = "ADALORA"
    owner = "AdaLoRA"
    beginning = "lora_"
    tensors = (frozenset({_A, _E, _B}),)
    settings = frozenset({"lora_alpha", "init_r"})
    past = frozenset(
        {
            *("r", "rank_pattern", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            *("init_lora_weights", "megatron_core", "qalora_group_size"),
        }
    )
    dropout = "lora_dropout"

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Form | None:
        outputs, inputs = target.layout.matrix_shape
        rank = len(tensors[_A]) if tensors[_A].ndim == 2 else -1
        check_shapes(target, tensors, {_A: (rank, inputs), _E: (rank, 1), _B: (outputs, rank)})
        if rank == 0:
            return None
        check_rank(target, rank)
        form = TripletForm(target.layout, rank, number(config, "lora_alpha") / (number(config, "init_r") + _LEAST))
        form.set_factors(tensors[_A], tensors[_B])
        with torch.no_grad():
            form.values.copy_(tensors[_E].flatten())
        return form

    def written(self, adapted: Sequence[Adapted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        check_linear(adapted, self.owner, nn.Conv2d, transposed=True)
        tensors: dict[str, Tensor] = {}
        scale, ranks = adapted[0].form.scale, {}
        for each in adapted:
            kept = _kept(each.form)
            values = each.form.values[kept] * (each.form.share * each.form.scale / scale)
            tensors[f"{each.name}.{_A}"] = each.form.rows()[kept]
            tensors[f"{each.name}.{_E}"] = values.unsqueeze(1)
            tensors[f"{each.name}.{_B}"] = each.form.up[:, kept]
            ranks[each.name] = len(values)
        first = max(each.form.rank for each in adapted)
        pattern = {f"{name}.{_E}": [True] * rank + [False] * (first - rank) for name, rank in ranks.items()}
        return tensors, {
            "init_r": first,
            "target_r": max(1, round(sum(ranks.values()) / len(ranks))),
            "lora_alpha": scale * (first + _LEAST),
            "rank_pattern": pattern if min(ranks.values()) < first else None,
            "total_step": 1,  # PEFT asks for one; whoever trains on gives the steps of that training
            "fan_in_fan_out": any(each.form.layout.transposed for each in adapted),
        }


def _kept(form: TripletForm) -> Tensor:
    """The triplets that are not zero; one of them where all are, since PEFT's files have no rank of zero."""
    kept = form.values.detach() != 0
    kept[0] |= ~kept.any()
    return kept

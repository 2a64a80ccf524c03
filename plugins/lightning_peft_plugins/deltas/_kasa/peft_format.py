"""KaSA in folders of PEFT: a LoRA with numbers between its factors, over a weight without its smallest singular values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.deltas.peft_format import Adapted, Saved, Target, check_linear, check_rank, check_shapes
from lightning_peft.deltas.peft_lora import DOWN, UP, LoraFormat
from lightning_peft_plugins.deltas._shared.triplet_form import TripletForm

_VALUES = "lora_diag"


class KasaFormat(LoraFormat):
    """``lora_A``, ``lora_diag``, ``lora_B``. PEFT takes the singular values out of the base it is given; so is done here."""

    owner = "KaSA"
    tensors = (frozenset({DOWN, UP, _VALUES}),)
    settings = LoraFormat.settings | {"kasa_config"}
    kind = TripletForm

    def complete(self, config: Mapping[str, Any]) -> Collection[frozenset[str]]:
        return self.tensors

    def check(self, saved: Saved) -> None:
        super().check(saved)
        if saved.config.get("use_dora"):
            raise MisconfigurationException(f"{saved.path} is of both KaSA and DoRA, which PEFT has not. Save it again.")

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> TripletForm:
        form = super().form(target, tensors, config)
        assert isinstance(form, TripletForm)
        check_rank(target, form.rank, target.layout.largest_rank - 1)
        check_shapes(target, tensors, {_VALUES: (form.rank,)})
        with torch.no_grad():
            form.values.copy_(tensors[_VALUES])
        form.take_off(*_smallest(target.frozen, form.rank))
        return form

    def written(self, adapted: Sequence[Adapted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        check_linear(adapted, self.owner)
        for each in adapted:
            _check_taken(each)
        tensors, config = super().written(adapted)
        tensors |= {f"{each.name}.{_VALUES}": each.form.values for each in adapted}
        return tensors, config | {"kasa_config": {}}

    def factors(self, form: Any) -> tuple[Tensor, Tensor]:
        return form.rows(), form.up


def _smallest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the part of a weight that has its smallest singular values."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return right[-rank:], left[:, -rank:] * values[-rank:]


def _check_taken(each: Adapted) -> None:
    """See that what a form takes off its weight is what PEFT will take off."""
    form, layer = each.form, each.layer
    assert isinstance(layer, nn.Linear)
    weight = Target(each.name, layer, form.layout).frozen
    same = form.taken == form.rank and form.share == 1
    if same:
        down, up = _smallest(weight, form.rank)
        same = torch.allclose(up @ down, (form.taken_up @ form.taken_down).to(up.dtype), atol=1e-4 * float(weight.abs().max()))
    if not same:
        raise MisconfigurationException(
            f"The delta of {each.name} takes another part off its weight than the smallest singular values, which PEFT's KaSA "
            "takes off. Write it as a LoRA: own=False."
        )

"""PiSSA and OLoRA in folders of PEFT that were not converted: a LoRA beside what its first product left of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.peft_format import Saved, Target
from lightning_peft.deltas.peft_lora import LoraFormat
from lightning_peft_plugins.deltas._shared.starts import STARTS


class ResidualFormat(LoraFormat):
    """PEFT finds the first product in the base that it is given, and takes it off; so is done here."""

    start: str

    def check(self, saved: Saved) -> None:
        """Nothing to refuse: what the base lost is found again."""

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRankForm:
        form = super().form(target, tensors, config)
        trained = {name: value.detach().clone() for name, value in form.named_parameters()}
        STARTS[self.start](form, target.frozen, Generator())
        with torch.no_grad():
            for name, value in form.named_parameters():
                value.copy_(trained[name])
        return form


class PissaFormat(ResidualFormat):
    """Of ``init_lora_weights="pissa"``."""

    start = "pissa"


class OloraFormat(ResidualFormat):
    """Of ``init_lora_weights="olora"``."""

    start = "olora"

"""Weights that go back when masks are chosen: a round of SAP against a lottery ticket by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from masked_weights import EVERYTHING
from torch import Tensor

from lightning_peft import SAP, LayerGrowth, MaskedPruning
from lightning_peft.functional import pq_pruned
from lightning_peft.testing.modules import Plain, deepened
from lightning_peft.testing.runs import fit


class Ticket(Callback):
    """A lottery ticket by hand: from 12 steps on the first weights, with masks, a fresh optimizer and a fresh schedule."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 12:
            return
        weights = {name: p for name, p in pl_module.named_parameters() if p.ndim > 1}
        flat = torch.cat([p.abs().flatten() for p in weights.values()])
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[flat.argsort(stable=True)[: pq_pruned(flat)]] = False
        parts = kept.split([p.numel() for p in weights.values()])
        self.masks = {name: part.view_as(p) for part, (name, p) in zip(parts, weights.items(), strict=True)}
        pl_module.load_state_dict(self.first)
        trainer.optimizers[0].state.clear()
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.schedule)
        trainer.optimizers[0].param_groups[0]["lr"] = self.lr
        for name, parameter in weights.items():
            parameter.mul_(self.masks[name])
            parameter.register_hook(lambda grad, mask=self.masks[name]: grad * mask)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.schedule = copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict())
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]


class Decaying(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_round_of_sap_is_a_lottery_ticket() -> None:
    ticket = Ticket()
    theirs = fit([], after=[ticket], style=Decaying, max_epochs=6)
    mine = fit([SAP(exclude=EVERYTHING, start=12, end=None)], style=Decaying, max_epochs=6)
    assert mine.losses == theirs.losses
    share = sum(float((~mask).sum()) for mask in ticket.masks.values()) / sum(mask.numel() for mask in ticket.masks.values())
    assert share > 0.05
    values = dict(mine.module.named_parameters())
    assert all(torch.equal(values[name] == 0, ~mask) for name, mask in ticket.masks.items())


class Biases(Callback):
    """The first bias, which no mask touches, as each step finds it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.model[0].bias.detach().clone())


def test_every_choice_goes_back_to_the_same_step() -> None:
    biases = Biases()
    fit([MaskedPruning(0.6, exclude=EVERYTHING, start=4, end=9, every=5, rewind=2)], after=[biases], max_epochs=3)
    back = [step for step, bias in enumerate(biases.seen) if torch.equal(bias, biases.seen[2])]
    assert back == [2, 4, 9]


def test_rewinding_needs_a_time_before_the_first_choice() -> None:
    with pytest.raises(MisconfigurationException, match="goes back to step 3, but masks are chosen from step 3 on"):
        fit([MaskedPruning(0.5, exclude=EVERYTHING, start=3, rewind=3)])
    growth = LayerGrowth(start=1, to=2, at="step:2")
    with pytest.raises(MisconfigurationException, match="cannot rewind a network that layer_growth grows"):
        fit([MaskedPruning(0.5, exclude=EVERYTHING, start=3, rewind=0), growth], style=deepened(Plain))

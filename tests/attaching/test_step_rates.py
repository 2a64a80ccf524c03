"""Factors on learning rates hold for one step each, whoever sets the rates between steps, or nobody."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_peft import Lane, Method
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.trace import difference


class Halved(Method):
    """Every step is half as long."""

    lane = Lane.REPORT

    def lr_factor(self) -> float:
        return 0.5


class Rates(Callback):
    """The learning rate between steps."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_without_a_scheduler_the_rate_comes_back_after_each_step() -> None:
    rates = Rates()
    halved = fit([Halved()], optimizer="sgd", after=[rates])
    assert set(rates.seen) == {0.02}
    torch.manual_seed(0)
    by_hand = fit([], module=Plain("sgd", lr=0.01))
    assert difference(dict(by_hand.module.state_dict()), dict(halved.module.state_dict())) is None

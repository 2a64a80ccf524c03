"""What PSKD refuses: impossible arguments, outputs that are not one row a sample, a Trainer without end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pskd_toys import Lit, Net, fit, loader
from torch import Tensor

from lightning_peft_plugins.regularizers.pskd import PSKD


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 1.2},
        {"alpha": -0.1},
        {"epochs": 0},
        {"num_samples": 0},
        {"memory": "disk"},
        {"teacher": "ema"},
        {"dtype": "int8"},
    ],
)
def test_impossible_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(arguments))):
        PSKD(**arguments)


def test_logits_of_tokens_are_refused() -> None:
    class PerToken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, None].expand(-1, 3, -1)

    class Tokens(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).mean()

    module = Tokens()
    module.net = PerToken()
    with pytest.raises(MisconfigurationException, match=r"shape \(batch, classes\)"):
        fit(PSKD(0.8), module, loader())


def test_a_step_that_repeats_its_samples_is_refused() -> None:
    class Views(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.criterion(self(torch.cat([batch[0], -batch[0]])), batch[1].repeat(2))

    with pytest.raises(MisconfigurationException, match="logits of 8 samples for a batch of 4"):
        fit(PSKD(0.8), Views(), loader())


def test_a_trainer_without_end_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"PSKD\(epochs=...\)"):
        fit(PSKD(0.8), Lit(), loader(), max_epochs=-1)

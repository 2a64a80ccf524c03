"""What cannot be calibrated, and what the message says to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibration_toys import calibrate, deep
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_peft
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.toys import ToyScale, ToyThreshold, ToyWanda


class Shuffled:
    """Other batches in every pass, from random numbers of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Any:
        return iter([(torch.randn(2, 16, generator=self.generator), torch.zeros(2, dtype=torch.long)) for _ in range(2)])


REFUSED: dict[str, tuple[Callable[[], list[str]], str]] = {
    "generator": (lambda: calibrate(deep(), ToyWanda(), iter(loader())), r"batches=list\(batches\)"),
    "empty": (lambda: calibrate(deep(), ToyWanda(), []), "holds no batch"),
    "shuffled": (lambda: calibrate(deep(), ToyWanda(), Shuffled()), "other batches in a later pass.*without shuffle"),
    "method": (lambda: calibrate(deep(), ToyThreshold()), "toy_threshold does not calibrate"),
    "no method": (lambda: calibrate(deep(), []), "methods= is empty"),
    "no list": (lambda: calibrate(Plain(), ToyWanda()), "has no list of equal blocks"),
    "no such block": (lambda: calibrate(deep(), ToyWanda(), blocks=["nothing"]), "blocks= names 'nothing'"),
    "nested": (lambda: calibrate(deep(), ToyWanda(), blocks=["blocks", "blocks.0.fc1"]), "a part of blocks.0"),
    "stage": (lambda: calibrate(deep(), ToyWanda(), stage="train"), "choose one of validate, test, predict"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_calibrated_is_refused_with_the_way_out(what: str) -> None:
    run, message = REFUSED[what]
    with pytest.raises(MisconfigurationException, match=message):
        run()


def test_a_module_under_maps_is_refused() -> None:
    module = deep()
    ToyScale().attach(module)
    with pytest.raises(MisconfigurationException, match="Bake it first"):
        calibrate(module, ToyWanda())
    calibrate(lightning_peft.bake(module), ToyWanda())


def test_layers_that_are_read_by_function_are_named() -> None:
    class Attending(Plain):
        def build(self) -> None:
            super().build()
            self.parts = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)])

        def forward(self, inputs: Tensor) -> Any:
            states = inputs[:, None]
            return super().forward(self.parts[0](states, states, states)[0][:, 0])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(Attending(), ToyWanda(targets=["out_proj"]), blocks="parts")
    assert any("inputs of parts.0.out_proj are unknown: never called" in str(entry.message) for entry in caught)

"""Modes that are given back, of parts beside layers too."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft import LoRA
from lightning_peft.network.modes import modes_kept
from lightning_peft.weights.parts import placed_parts


def test_parts_beside_the_layers_of_a_network_within_get_their_mode_back() -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2).eval())

    module = Module()
    LoRA(2, dropout=0.5, exclude=None).attach(module)
    parts = [placed.part for placed in placed_parts(module)]
    with modes_kept(module.net):
        assert not any(part.training for part in parts)
        assert not module.net[1].training
    assert [part.training for part in parts] == [True, False]
    assert [layer.training for layer in module.net] == [True, True, False]

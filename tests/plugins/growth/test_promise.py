"""Operators that promise to keep the function are held to it in the first step after growth."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from growth_toys import Deep, grow
from torch import Tensor, nn

from lightning_peft import LayerGrowth
from lightning_peft_plugins.growth._layer_growth.promise import Promise

PROMISES = "promises that the grown network computes what it did"


class Block(nn.Module):
    """Writes into the residual stream by two layers, one of which has a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.out_proj, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(x.tanh()) + self.second(x.tanh())


class Two(Deep):  # type: ignore[misc,valid-type]
    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.blocks = nn.Sequential(Block(), Block())


def said(**settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grow([LayerGrowth(at="step:2", blocks="blocks", to=4, **settings)], style=Two)
    return [str(warning.message) for warning in caught if PROMISES in str(warning.message)]


@pytest.mark.parametrize("operator", ["zero", "net2net", "lemon"])
def test_a_promise_that_is_missed_is_said_once_with_its_figure(operator: str) -> None:
    (message,) = said(operator=operator)
    figure = re.search(r"blocks\.[0-3] by ([0-9.]+)%", message)
    assert figure is not None
    assert float(figure[1]) > 1
    assert "2 of 2" in message
    assert said(operator=operator, outputs=["out_proj", "second"]) == [], "the cure"


@pytest.mark.parametrize("operator", ["stack", "interpolate"])
def test_operators_that_promise_nothing_are_not_asked(operator: str) -> None:
    assert said(operator=operator) == []


class Mixer(nn.Module):
    """A block whose class gives it a name for its layer, and a slope, by its position."""

    def __init__(self, place: int, names: list[str]) -> None:
        super().__init__()
        self.slope = 2.0 if place % 3 == 2 else 1.0
        self.inner = nn.ModuleDict({names[place % len(names)]: nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.inner.values()
        return x + layer((self.slope * x).tanh())


class Mixers(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.Sequential(*(Mixer(place, config.names) for place in range(config.num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def said_of(operator: str, names: list[str]) -> list[str]:
    class Configured(Deep):  # type: ignore[misc,valid-type]
        def __init__(self, optimizer: str = "adam") -> None:
            super().__init__(optimizer)
            self.blocks = Mixers(transformers.PretrainedConfig(num_layers=4, names=names))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grow([LayerGrowth(operator, at="step:2", blocks="blocks.blocks", to=8)], style=Configured)
    return [str(warning.message) for warning in caught if PROMISES in str(warning.message)]


def test_a_block_that_is_another_where_it_moves_to_is_named() -> None:
    (message,) = said_of("lemon", ["proj"])
    assert "block 1 of blocks.blocks becomes block 2 and has slope = 2.0, not 1.0" in message
    assert said_of("zero", ["proj"]) == [], "the cure"


def test_blocks_of_several_kinds_are_all_silenced() -> None:
    assert said_of("zero", ["o_proj", "out_proj"]) == []


def test_the_figure_is_the_length_of_what_was_added() -> None:
    block = nn.Linear(4, 4, bias=False)
    block.weight.data = 1.5 * torch.eye(4)
    promise = Promise({"blocks.1": block}, "zero")
    block(torch.ones(2, 4))
    with pytest.warns(UserWarning, match=r"blocks\.1 by 50\.0% \(1 of 1 do\)"):
        promise.judge()
    assert not block._forward_hooks

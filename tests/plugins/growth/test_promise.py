"""Operators that promise to keep the function are held to it in the first step after growth."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
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


def test_the_figure_is_the_length_of_what_was_added() -> None:
    block = nn.Linear(4, 4, bias=False)
    block.weight.data = 1.5 * torch.eye(4)
    promise = Promise({"blocks.1": block}, "zero")
    block(torch.ones(2, 4))
    with pytest.warns(UserWarning, match=r"blocks\.1 by 50\.0% \(1 of 1 do\)"):
        promise.judge()
    assert not block._forward_hooks

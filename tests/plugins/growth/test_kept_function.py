"""The user's own step shows what blocks alone do not, and asking it leaves no trace."""

from __future__ import annotations

import warnings
from typing import Any

import numpy
import pytest
import torch
from growth_toys import Deep, grow
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_peft import LayerGrowth
from lightning_peft.structure.width_map import Layer, WidthMap
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.trace import difference
from lightning_peft_plugins.growth._layer_growth.kept_function import KeptFunction

PROMISES = "promises that the grown network computes what it did"


class Between(nn.Sequential):
    """Does something for each block, beside the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(3.0 * x)
        return x


class Beside(Deep):  # type: ignore[misc,valid-type]
    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.blocks = Between(*self.blocks)


class Noting(Deep):  # type: ignore[misc,valid-type]
    """Whatever a step can leave behind."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.seen, self.losses, self.by_batch = 0, [], {}
        self.mean = MeanMetric()
        self.register_buffer("queue", torch.zeros(3))
        self.drop = nn.Dropout(0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        self.queue.copy_(torch.roll(self.queue, 1)).add_(1)
        loss = super().training_step((self.drop(batch[0]) + 0.01 * float(numpy.random.rand()), *batch[1:]), batch_idx)
        self.losses.append(float(loss.detach()))
        self.by_batch[batch_idx] = self.losses[-1]
        self.mean.update(loss.detach())
        self.log("seen", float(self.seen))
        return loss

    def left(self) -> dict[str, Any]:
        noted = {"seen": self.seen, "losses": self.losses, "batches": self.by_batch, "mean": self.mean.compute()}
        return {**self.state_dict(), **noted, "next": (numpy.random.rand(), torch.rand(1))}


def said(style: Any, operator: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grow([LayerGrowth(operator, at="step:2", blocks="blocks", to=6, grow_time=2)], style=style)
    return [str(warning.message) for warning in caught if PROMISES in str(warning.message)]


@pytest.mark.parametrize("operator", ["zero", "net2net", "lemon", "msg"])
def test_what_forward_does_beside_the_blocks_is_found(operator: str) -> None:
    (message,) = said(Beside, operator)
    assert "its answers to a batch, in evaluation mode, changed by" in message
    assert said(Deep, operator) == []


def test_operators_that_promise_nothing_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeptFunction, "_answers", lambda self: pytest.fail("nothing was promised"))
    assert said(Beside, "stack") == []


def test_answers_that_are_others_when_they_are_asked_twice_say_nothing() -> None:
    class Restless(Beside):
        drawn = iter(range(1000))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1 + next(type(self).drawn))

    assert said(Restless, "zero") == []


def test_asking_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Any]:
        numpy.random.seed(0)
        method = LayerGrowth("zero", at="step:2", blocks="blocks", to=6)
        module: Any = grow([method], style=Noting).module
        return module.left()

    asked: list[list[Tensor] | None] = []
    ask = KeptFunction._answers

    def noted(self: KeptFunction) -> list[Tensor] | None:
        asked.append(ask(self))
        return asked[-1]

    monkeypatch.setattr(KeptFunction, "_answers", noted)
    found = trained()
    assert len(asked) == 3
    assert all(answers is not None for answers in asked)
    assert difference(asked[0], asked[1]) is None
    monkeypatch.setattr(KeptFunction, "_answers", lambda self: None)
    assert difference(found, trained()) is None


class Scaling(Plain):
    """Multiplies by its width, which no width map says."""

    scales = True

    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def logits(self, inputs: Tensor) -> Tensor:
        hidden = self.model[:2](inputs)
        return self.model[2](hidden * hidden.shape[-1] if self.scales else hidden)


@pytest.mark.parametrize("scales", [True, False])
def test_what_a_width_map_does_not_say_is_found(scales: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaling, "scales", scales)
    width_map = WidthMap({"width": 8}, {"0": Layer(output="width"), "2": Layer(input="width")})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method = LayerGrowth("net2net", at="step:2", to={"width": 16}, width_map=width_map, network="model")
        fit([method], style=Scaling, max_epochs=2)
    assert [PROMISES in str(each.message) for each in caught].count(True) == scales

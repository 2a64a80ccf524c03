"""Modules that optimise by hand take other steps than one a batch; the cure that the warning names is carried out."""

from __future__ import annotations

import re
import warnings

import pytest

from lightning_peft import Lane, Method
from lightning_peft.compose.schedule import parse_point
from lightning_peft.testing.modules import Manual, TwoOptimizers
from lightning_peft.testing.runs import fit


class Ramp(Method):
    """Notes which share of its course every step stands at."""

    lane = Lane.REPORT

    def __init__(self, end="100%"):
        super().__init__()
        self.end = parse_point(end)

    def start(self, run):
        self.length = run.place(self.end)

    def after_step(self, run):
        self.share = run.step / self.length


class EveryOther(Manual):
    """Accumulates two batches by hand."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.base_loss(batch) / 2)
        if batch_idx % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


class Twice(Manual):
    """Takes two steps on every batch."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        super().training_step(batch, batch_idx)


class EveryOtherPair(TwoOptimizers):
    """Both optimizers step on every second batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 1:
            super().training_step(batch, batch_idx)
        else:
            self.base_loss(batch)


class Uneven(TwoOptimizers):
    """The second optimizer steps on every batch, the first on every second one."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 1:
            super().training_step(batch, batch_idx)
        else:
            self.base_loss(batch)
            self.optimizers()[1].step()


def course(style, end="100%", **trainer):
    """Return where a schedule stands after the last step, and what was said."""
    method = Ramp(end)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit([method], style=style, **trainer)
    return method.share, [str(entry.message) for entry in said if "of its first optimizer" in str(entry.message)]


@pytest.mark.parametrize(
    ("style", "share", "settings"),
    [
        (EveryOther, 0.5, {"max_epochs": 2, "max_steps": 4}),
        (EveryOtherPair, 0.5, {"max_epochs": 2, "max_steps": 8}),
        (Twice, 2.0, {"max_epochs": -1, "max_steps": 16}),
    ],
)
def test_a_schedule_that_will_not_fit_is_told_with_its_cure(style, share, settings):
    found, said = course(style, max_epochs=2)
    assert found == share
    assert len(said) == 1
    named = re.search(r"Trainer\(max_epochs=(-?\d+), max_steps=(\d+)\)", said[0])
    assert {"max_epochs": int(named[1]), "max_steps": int(named[2])} == settings
    assert course(style, **settings) == (1.0, [])


def test_optimizers_of_different_pace_are_cured_by_steps():
    share, said = course(Uneven, max_epochs=2)
    assert share == 0.5
    assert "the training has 4. Write points of training in steps" in said[0]
    assert course(Uneven, end=4, max_epochs=2) == (1.0, [])


def test_epochs_are_cured_by_steps():
    share, said = course(EveryOther, end="2ep", max_epochs=2)
    assert share == 0.5
    assert said[0].endswith("Write them in optimizer steps, of which an epoch has 2.")
    assert course(EveryOther, end=4, max_epochs=2) == (1.0, [])


@pytest.mark.parametrize("style", [Manual, TwoOptimizers])
def test_one_step_a_batch_is_what_everybody_expects(style):
    assert course(style, max_epochs=2) == (1.0, [])

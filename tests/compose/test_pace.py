"""Modules that optimise by hand take other steps than one a batch; the cure that the warning names is carried out."""

from __future__ import annotations

import re
import warnings

import pytest
from lightning.pytorch import Callback

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


def test_a_limit_in_steps_of_all_optimizers_is_counted_by_their_pace():
    share, said = course(Uneven, max_epochs=-1, max_steps=12)
    assert share == 4 / 6
    assert "the training has 4." in said[0]


class Late(EveryOther):
    """Does not train in its first epoch."""

    def training_step(self, batch, batch_idx):
        if self.current_epoch:
            super().training_step(batch, batch_idx)
        else:
            self.base_loss(batch)


def test_an_epoch_is_judged_by_its_own_steps():
    _, said = course(Late, max_epochs=3)
    assert len(said) == 1
    assert "takes 2 steps of its first optimizer in an epoch of 4 batches" in said[0]


class Halfway(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 2


def test_an_epoch_that_was_cut_short_says_nothing():
    assert course(Manual, max_epochs=2, after=[Halfway()]) == (0.25, [])


class FirstAlone(TwoOptimizers):
    """Steps the first optimizer only, on every second batch."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.base_loss(batch))
        if batch_idx % 2 == 1:
            self.optimizers()[0].step()


@pytest.mark.parametrize("style", [Uneven, FirstAlone])
def test_optimizers_of_different_pace_are_cured_by_steps(style):
    share, said = course(style, max_epochs=2)
    assert share == 0.5
    assert "the training has 4. Write points of training in steps" in said[0]
    assert course(style, end=4, max_epochs=2) == (1.0, [])


class AllButOne(Manual):
    def training_step(self, batch, batch_idx):
        if batch_idx:
            super().training_step(batch, batch_idx)
        else:
            self.base_loss(batch)


def test_a_single_step_that_is_left_out_is_no_other_pace():
    assert course(AllButOne, max_epochs=1) == (0.75, [])


def test_epochs_are_cured_by_steps():
    share, said = course(EveryOther, end="2ep", max_epochs=2)
    assert share == 0.5
    assert said[0].endswith("Write them in optimizer steps, of which an epoch has 2.")
    assert course(EveryOther, end=4, max_epochs=2) == (1.0, [])


@pytest.mark.parametrize("style", [Manual, TwoOptimizers])
def test_one_step_a_batch_is_what_everybody_expects(style):
    assert course(style, max_epochs=2) == (1.0, [])

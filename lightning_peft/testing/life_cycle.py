"""Checks that a method trains the same however Lightning's Trainer is asked to run it."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.testing.modules import Bare, stream
from lightning_peft.testing.runs import Fit, assert_same
from lightning_peft.testing.shared_runs import EPOCHS, Factory, SharedRuns

STEPS = 4 * EPOCHS


class LifeCycleChecks(SharedRuns):
    """A module that asks nothing of Lightning, validation with its sanity check, an end in steps, and a stream.

    All of them see the same samples in the same order as the uninterrupted training, so they must end in the same state.
    """

    no_stream: ClassVar[str] = ""

    def test_validates_before_it_trains(self, factory: Factory, uninterrupted: Fit) -> None:
        run = self._bare(factory, max_epochs=EPOCHS)
        assert_same(uninterrupted, run, "without against with a sanity check, for a module that asks nothing of Lightning")

    def test_ends_after_steps(self, factory: Factory, uninterrupted: Fit) -> None:
        run = self._bare(factory, max_epochs=None, max_steps=STEPS)
        assert_same(uninterrupted, run, f"Trainer(max_epochs={EPOCHS}) against Trainer(max_steps={STEPS})")

    def test_trains_on_a_stream(self, factory: Factory, uninterrupted: Fit) -> None:
        settings = {"data": stream(), "max_epochs": None, "max_steps": STEPS}
        if self.no_stream:
            with pytest.raises(MisconfigurationException, match=re.compile(self.no_stream, re.DOTALL)):
                self._bare(factory, **settings)
            return
        assert_same(uninterrupted, self._bare(factory, **settings), "a loader with a length against one without")

    def _bare(self, factory: Factory, **settings: Any) -> Fit:
        return self._fit([factory()], style=self._adapted(Bare), num_sanity_val_steps=2, **settings)

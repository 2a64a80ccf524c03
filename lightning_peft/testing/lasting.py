"""Checks that what a method attached can stay on the module when its training is over."""

from __future__ import annotations

import copy
from typing import Any

import torch

import lightning_peft
from lightning_peft.structure.part_states import unmergeable
from lightning_peft.testing.modules import loader, trainer
from lightning_peft.testing.runs import Fit
from lightning_peft.testing.shared_runs import Factory, SharedRuns
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.detach import attachments


class LastingChecks(SharedRuns):
    """A training with ``stays = True``, of the first configuration alone: the switch is the engine's."""

    def test_what_it_attached_can_stay(self, lead: Factory) -> None:
        method = lead()
        method.stays = True
        live: Fit = self._fit([method], optimizer="sgd")
        ordinary = self._descended(lead)
        if not attachments(live.module):
            self._assert_clean(live.module, "a fit with stays = True, which attached nothing")
            return
        inputs = next(iter(loader(8)))[0]
        before = trace(live.module)
        with torch.no_grad():
            answered = live.module.eval().logits(inputs)  # type: ignore[operator]
        live.module.train()
        seen: Any = trainer().predict(live.module, loader(8))
        assert torch.equal(seen[0], answered), "the answers of a module in use are not those it gives to a Trainer"
        assert difference(before, trace(live.module)) is None, "an evaluation took off what was to stay"
        if not unmergeable(live.module):
            baked = lightning_peft.bake(copy.deepcopy(live.module))
            found = difference(dict(ordinary.module.state_dict()), dict(baked.state_dict()))
            assert found is None, f"an ordinary fit against bake() of a module that kept what it attached: {found}"

"""The envelope in training: against the proximal step by hand, and that groups fade before they go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

from lightning_peft import GroupEnvelope
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.pruning.functional.group_envelope import group_envelope_scale

EVERYTHING: Any = ()


class Descent(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def channels(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim > 1]


class Proximal(Callback):
    """The proximal step by hand, on the rows of all matrices."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        rows = [row for weight in channels(pl_module) for row in weight]
        norms = torch.stack([row.norm() for row in rows])
        rate = 0.2 * 0.9 ** (trainer.global_step - 1)  # the schedule has moved on already
        for row, scale in zip(rows, group_envelope_scale(norms, len(rows) - len(rows) // 2, 0.3 * rate), strict=True):
            row.mul_(scale)


def test_each_step_is_a_proximal_step() -> None:
    mine = fit([GroupEnvelope(0.5, strength=0.3, exclude=EVERYTHING, end="100%")], style=Descent, max_epochs=2)
    theirs = fit([], after=[Proximal()], style=Descent, max_epochs=2)
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-4, atol=1e-5)


def test_the_others_have_faded_when_they_go() -> None:
    class Norms(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 39:
                weights = [p.detach() for name, p in pl_module.named_parameters() if p.ndim > 1]
                self.norms = torch.cat([weight.norm(dim=1) for weight in weights]).sort().values

    watch = Norms()
    module = fit(
        [GroupEnvelope(0.5, strength=2.0, exclude=EVERYTHING, end=40)], after=[watch], style=Descent, max_epochs=12
    ).module
    half = len(watch.norms) // 2
    assert watch.norms[:half].max() < 0.5 * watch.norms[half:].median()
    rows = torch.cat([(weight != 0).any(1) for weight in channels(module)])
    assert int((~rows).sum()) == half


def test_arguments_are_checked() -> None:
    with pytest.raises(MisconfigurationException, match="must be positive"):
        GroupEnvelope(0.5, strength=0.0)
    with pytest.raises(MisconfigurationException, match="within each M"):
        GroupEnvelope(pattern="2:4")

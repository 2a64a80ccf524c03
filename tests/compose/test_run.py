from __future__ import annotations

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import Lane, Method
from lightning_peft.testing.modules import Root, loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy


class Look(Method):
    lane = Lane.REPORT

    def __init__(self, read=lambda run: None):
        super().__init__()
        self.read = read
        self.clock = []

    def start(self, run):
        self.seen = self.read(run)

    def after_step(self, run):
        self.clock.append((run.step, run.epoch))


@pytest.mark.parametrize(
    ("trainer", "epochs", "total", "per_epoch"),
    [
        ({"max_epochs": 3}, 3, 12, 4),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 3, 6, 2),
        ({"max_epochs": 3, "limit_train_batches": 2}, 3, 6, 2),
        ({"max_epochs": None, "max_steps": 6}, 2, 6, 4),
    ],
)
def test_how_long_a_training_is(trainer, epochs, total, per_epoch):
    look = Look(lambda run: (run.total_epochs, run.total_steps, run.steps_per_epoch))
    fit([look], **trainer)
    assert look.seen == (epochs, total, per_epoch)
    assert look.clock[-1] == (total, epochs - 1)
    assert [step for step, _ in look.clock] == list(range(1, total + 1))


def test_a_fraction_of_an_endless_training_is_refused():
    with pytest.raises(MisconfigurationException, match="has no end: set max_epochs or max_steps"):
        fit([Look(lambda run: run.total_steps)], max_epochs=-1)


def test_what_a_run_knows():
    look = Look(lambda run: (run.network_name, run.network is run.module.model, run.samples.size, run.epoch, run.step))
    fit([look, ToyEntropy()], data=loader(24))
    assert look.seen == ("model", True, 24, 0, 0)
    look = Look(lambda run: (run.network_name, run.network is run.module, run.samples))
    fit([look], style=Root)
    assert look.seen == ("", True, None)

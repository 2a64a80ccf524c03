from __future__ import annotations

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import Lane, Method
from lightning_peft.compose.run import Run
from lightning_peft.compose.schedule import parse_point
from lightning_peft.testing.modules import Manual, Root, TwoOptimizers, loader, trainer
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


@pytest.mark.parametrize("sanity", [0, 2])
def test_max_steps_alone_beside_a_validation_loader(sanity):
    look = Look(lambda run: (run.total_steps, run.place(parse_point("50%")), run.place(parse_point("1.5ep")), run.total_epochs))
    fit([look], max_epochs=None, max_steps=7, num_sanity_val_steps=sanity)
    assert look.seen == (7, 4, 6, 2)
    assert look.clock[-1] == (7, 1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(loader(32, 8).dataset)


def stream():
    return DataLoader(Stream(), 8)


def test_a_stream_needs_a_length_only_for_what_is_a_part_of_it():
    look = Look(lambda run: (run.place(parse_point(3)), run.end, run.total_epochs))
    fit([look], data=stream(), max_epochs=2)
    assert look.seen == (3, None, 2)
    look = Look(lambda run: (run.total_steps, run.place(parse_point("50%"))))
    fit([look], data=stream(), max_epochs=-1, max_steps=6)
    assert look.seen == (6, 3)
    assert look.clock[-1] == (6, 1)


class Stops(Callback):
    """Ends a training that has no end."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_endless_training_needs_an_end_only_for_what_is_a_part_of_it():
    look = Look(lambda run: (run.place(parse_point(3)), run.place(parse_point("2ep")), run.end))
    fit([look], max_epochs=-1, after=[Stops()])
    assert look.seen == (3, 8, None)


@pytest.mark.parametrize(
    ("data", "trainer", "point", "match", "cure", "placed"),
    [
        (loader, {"max_epochs": -1}, "50%", r"Trainer\(max_epochs=...\) or Trainer\(max_steps", {"max_epochs": 2}, 4),
        (loader, {"max_epochs": -1}, "50%", r"Trainer\(max_epochs=...\) or Trainer\(max_steps", {"max_steps": 6}, 3),
        (stream, {"max_epochs": 2}, "50%", r"Trainer\(max_steps=...\), since the loader has no", {"max_steps": 6}, 3),
        (stream, {"max_epochs": 2}, "1.5ep", r"Trainer\(limit_train_batches=...\)", {"limit_train_batches": 2}, 3),
        (stream, {"max_epochs": 2}, "1.5ep", "or write the point as a number of optimizer steps", {}, None),
    ],
)
def test_what_cannot_be_placed_is_refused_with_a_cure_that_works(data, trainer, point, match, cure, placed):
    with pytest.raises(MisconfigurationException, match=match):
        fit([Look(lambda run: run.place(parse_point(point)))], data=data(), **trainer)
    look = Look(lambda run: run.place(parse_point(6 if placed is None else point)))
    fit([look], data=data(), **(trainer | cure))
    assert look.seen == (6 if placed is None else placed)


def test_accumulation_that_changes_between_epochs():
    look = Look(lambda run: (run.total_steps, *(run.place(parse_point(f"{n}ep")) for n in range(5)), run.total_epochs))
    fit([look], max_epochs=4, before=[GradientAccumulationScheduler({1: 2, 3: 3})])
    # 4 batches: one step each, then one for two, then one for three and one for the last.
    assert look.seen == (10, 0, 4, 6, 8, 10, 4)
    assert [step for step, epoch in look.clock if epoch == 2] == [7, 8]
    look = Look(lambda run: (run.total_steps, run.total_epochs))
    fit([look], max_epochs=4, max_steps=7, before=[GradientAccumulationScheduler({1: 2, 3: 3})])
    assert look.seen == (7, 3)
    assert look.clock[-1] == (7, 2)
    fit([look], max_epochs=4, before=[GradientAccumulationScheduler({0: 4}), GradientAccumulationScheduler({0: 2})])
    assert look.seen == (8, 4), "Lightning does as the last one says"
    assert look.clock[-1] == (8, 3)


def test_max_steps_counts_every_optimizer_under_manual_optimization():
    look = Look(lambda run: run.total_steps)
    fit([look], style=TwoOptimizers, max_epochs=-1, max_steps=12)
    assert look.seen == 6
    assert look.clock[-1][0] == 6


def test_steps_say_nothing_of_epochs_under_manual_optimization():
    class EveryOther(Manual):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2:
                super().training_step(batch, batch_idx)
            else:
                self.base_loss(batch)

    look = Look(lambda run: run.total_epochs)
    fit([look], style=EveryOther, max_epochs=2, max_steps=4)
    assert look.seen == 2
    assert look.clock[-1] == (4, 1)


def test_an_end_in_steps_asks_for_no_loader(monkeypatch):
    module, runner = Root(), trainer(max_epochs=-1, max_steps=5)
    monkeypatch.setattr(runner.fit_loop, "setup_data", pytest.fail)
    assert Run(runner, module, "", module).end == 5


def test_nothing_to_train_on_is_no_error():
    look = Look(lambda run: run.total_steps)
    fit([look], max_epochs=2, limit_train_batches=0, num_sanity_val_steps=2)
    assert look.seen == 2
    look = Look(lambda run: run.total_epochs)
    fit([look], max_epochs=0, num_sanity_val_steps=2)
    assert look.seen == 1, "nothing may divide by it"


def test_what_a_run_knows():
    look = Look(lambda run: (run.network_name, run.network is run.module.model, run.samples.size, run.epoch, run.step))
    fit([look, ToyEntropy()], data=loader(24))
    assert look.seen == ("model", True, 24, 0, 0)
    look = Look(lambda run: (run.network_name, run.network is run.module, run.samples))
    fit([look], style=Root)
    assert look.seen == ("", True, None)

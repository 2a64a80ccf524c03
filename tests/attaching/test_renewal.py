"""What a method sees and remembers of a run, and when it forgets that."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_peft import GBLM, BlockPruning, Lane, MaskedPruning, Method, Wanda
from lightning_peft.attaching.step_rates import StepRates
from lightning_peft.compose.schedule import Schedule
from lightning_peft.testing.callbacks import FailAt, PlannedError, every_epoch
from lightning_peft.testing.modules import Plain, deepened, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale
from lightning_peft.testing.trace import difference


@dataclass
class Tally:
    steps: int = 0


class Diary(Method):
    """Remembers in every way a method can: a number, a list, an object, an attribute of its own making."""

    lane = Lane.REPORT

    def __init__(self, size=3, *extra, when=None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.extra, self.when = size, extra, when
        self.seen, self.count, self.box, self.tally = [], 0, {"last": None}, Tally()

    def start(self, run):
        self.knew = "found" in vars(self)

    def after_step(self, run):
        self.count += 1
        self.tally.steps += 1
        self.seen.append(run.step)
        self.box["last"] = run.step
        self.found = run.step

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"] + 0
        self.seen.append("loaded")


@pytest.mark.parametrize("ends", ["well", "refused", "failed"])
def test_a_method_knows_its_run_until_it_is_over(ends):
    knew = []

    class Knowing(Diary):
        def attach(self, module):
            knew.append(self.run is not None)
            if ends == "refused":
                raise MisconfigurationException("no")

        def finish(self, run):
            knew.append(self.run is run)

    method = Knowing()
    assert method.run is None
    if ends == "well":
        fit([method])
    else:
        with pytest.raises((MisconfigurationException, PlannedError)):
            fit([method], after=[FailAt(2)])
    assert knew == [True, True]
    assert method.run is None


def test_a_new_trainer_begins_anew_and_a_continued_one_does_not():
    method = Diary()
    module = fit([method], max_epochs=1).module
    assert (method.count, method.seen, method.found) == (4, [1, 2, 3, 4], 4)  # what a run leaves stays until the next
    run = fit([method], module=module, max_epochs=1)
    assert (method.count, method.seen, method.tally, method.knew) == (4, [1, 2, 3, 4], Tally(4), False)
    trainer(callbacks=[method]).test(Plain(), loader(), verbose=False)  # an evaluation of another is no training of it
    run.trainer.fit_loop.max_epochs = 2
    run.trainer.fit(run.module, loader(), loader(8))
    assert (method.count, method.steps) == (8, 8)


def test_another_module_begins_anew_even_in_the_same_trainer():
    method = Diary()
    runner = trainer(callbacks=[method], max_epochs=1)
    runner.fit(Plain(), loader(), loader(8))
    runner.fit_loop.max_epochs = 2
    runner.fit(Plain(), loader(), loader(8))
    assert method.seen == [1, 2, 3, 4]


def test_what_its_user_sets_stays():
    method = Diary(5, "a", "b")
    method.when, method.size, method.mark = Schedule(0, 4, "linear", (0.0, 1.0)), 6, "set before the first fit"
    fit([method])
    method.size, method.note = 7, "set between two fits"
    for _ in range(2):
        fit([method])
        assert (method.size, method.extra, method.note, method.count) == (7, ("a", "b"), "set between two fits", 4)
        assert method.mark == "set before the first fit"
    assert method.config()["size"] == 5  # as it was built
    method = Diary(size=1, name="kept")
    for size in (1, True, 1.0):
        method.size = size
        fit([method])
        assert (repr(method.size), method.name) == (repr(size), "kept")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))], ids=["copy", "pickle"])
def test_copies_forget_too(copied):
    method = Diary()
    fit([method])
    method.size = 1e300
    twin = copied(method)
    fit([twin])
    assert (twin.count, twin.seen, twin.size, method.count) == (4, [1, 2, 3, 4], 1e300, 4)


def test_a_failed_fit_is_forgotten():
    method = Diary()
    with pytest.raises(PlannedError):
        fit([method], after=[FailAt(2)])
    assert method.count == 2
    fit([method])
    assert (method.count, method.seen) == (4, [1, 2, 3, 4])


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_refused_resume_gives_back_method_and_module(used, tmp_path):
    fit([Diary(), ToyEntropy(), ToyScale()], after=[every_epoch(tmp_path)])
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    # Whatever fails, and however late: here the optimizer, which Lightning restores last.
    checkpoint["optimizer_states"] = [{"state": {}, "param_groups": []}]
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    methods = [Diary(), ToyEntropy(), ToyScale()]
    if used:
        fit(methods, max_epochs=2)
    states, seen = [method.state_dict() for method in methods], list(methods[0].seen)
    torch.manual_seed(3)
    module = Plain()
    before = {name: (id(value), value.clone()) for name, value in module.named_parameters()}
    with pytest.raises(ValueError, match="parameter groups"):
        fit(methods, module=module, resume=tmp_path / "bad.ckpt", max_epochs=2)
    after = {name: (id(value), value) for name, value in module.named_parameters()}
    assert list(before) == list(after)
    assert all(before[name][0] == after[name][0] and torch.equal(before[name][1], after[name][1]) for name in before)
    assert repr(states) == repr([method.state_dict() for method in methods])
    assert (methods[0].seen, methods[0].restored) == (seen, False)
    fit(methods, module=module)
    assert methods[0].seen == [1, 2, 3, 4]


@pytest.mark.parametrize("factor", [-0.5, math.nan, math.inf])
def test_an_impossible_learning_rate_factor(factor):
    class Climbs(Method):
        lane = Lane.REPORT

        def lr_factor(self):
            return factor

    torch.manual_seed(0)
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(
        MisconfigurationException, match=r"climbs multiplies learning rates by .* at step 0.*finite number, 0 or more"
    ):
        fit([Climbs()], module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Rests(Method):
    """Lets every second step rest, the first one too, or do a part of what it would."""

    lane = Lane.REPORT

    def __init__(self, factor=0.0):
        super().__init__()
        self.factor = factor

    def lr_factor(self):
        return 1.0 if self.steps % 2 else self.factor


class Falling(Plain):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


def test_a_learning_rate_factor_is_for_one_step():
    rates, weights = [], []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            weights.append(pl_module.model[0].weight.detach().clone())

    fit([Rests()], style=Falling, after=[Look()])
    assert rates == [0.05, 0.025, 0.0125, 0.00625]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [False, True, False]


@pytest.mark.parametrize(("wanted", "left"), [(True, 1.0), (False, 0.5)])
def test_a_trial_run_of_a_tuner_knows_no_factor(wanted, left):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    StepRates([Rests()], lambda: wanted).follow(optimizer)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == left


def test_a_load_state_that_fails_says_whose():
    class Careless(Diary):
        def load_state(self, state):
            self.count = state["missing"]

    with pytest.raises(
        MisconfigurationException, match=r"careless was not restored: .*KeyError: 'missing'.*start from its weights"
    ):
        Careless().load_state_dict(Careless().state_dict())


class Evaluating(Plain):
    """Comes in evaluation mode, as from_pretrained returns networks."""

    def build(self):
        super().build()
        self.eval()


EVALUATED = {
    "wanda": (Evaluating, lambda: Wanda(0.5, start=2, every=2)),
    "gblm": (Evaluating, lambda: GBLM(0.5, start=2, every=2)),
    "beta": (Evaluating, lambda: MaskedPruning(0.5, "beta", start=2, every=2)),
    "blocks": (deepened(Evaluating), lambda: BlockPruning(1, start=2, every=2)),
}


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("name", EVALUATED)
def test_calls_in_a_training_step_count_whatever_the_flag(name):
    """Without dropout and batch statistics the flag changes nothing, so both trainings must end in the same weights."""
    style, make = EVALUATED[name]

    class Other(Callback):  # calls outside of the step, in training mode and not, are none of the training's
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module(100 * batch[0])

    weights = []
    for mode in (False, True):
        torch.manual_seed(0)
        module = style().train(mode)
        fit([make()], module=module, after=[Other()])
        weights.append(dict(module.state_dict()))
    assert difference(*weights) is None
    plain = fit([make()], style=style).module
    assert difference(dict(plain.state_dict()), weights[0]) is None


@pytest.mark.filterwarnings("ignore:.*is already reached.*", "ignore:`Trainer.fit` stopped")
def test_a_finished_training_that_is_resumed_keeps_what_was_loaded(tmp_path):
    """Lightning skips such a fit, without a start; nothing was refused."""
    run = fit([ToyEntropy(), ToyScale()], after=[every_epoch(tmp_path)])
    again = fit([ToyEntropy(), ToyScale()], seed=4, resume=tmp_path / "epoch=0.ckpt", max_epochs=1)
    assert difference(dict(run.module.state_dict()), dict(again.module.state_dict())) is None

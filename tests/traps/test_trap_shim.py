"""Lightning traps T19, T20, T21: what Lightning reads off a shadowed method, and what copies of the module get."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_peft.testing.modules import Configured, OneArgument, Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


@pytest.mark.parametrize("style", [Plain, Configured])
def test_t19_configure_model_still_counts_as_overridden_or_not(style):
    """T19: `is_overridden` looks through `functools.wraps`, and Lightning then skips the hook."""
    seen = []

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.append(is_overridden("configure_model", pl_module))
            trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            seen.append(all(id(p) in trained for p in pl_module.parameters()))
            seen.append("parametrizations" in str(list(pl_module.state_dict())))

    fit([ToyScale()], style=style, after=[Look()])
    assert seen == [style is Configured, True, True]


def test_t20_a_one_argument_step_stays_one():
    """T20: without `__wrapped__`, or with two nested wrappers, Lightning passes `batch_idx` to a step that takes none."""
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(list(inspect.signature(pl_module.training_step.__wrapped__).parameters))

    run = fit([ToyEntropy(), ToyEntropy(name="second"), ToyScale()], style=OneArgument, after=[Look()])
    assert seen == [["batch"]]
    assert len(run.losses) == 4


def test_t20_a_decorated_step_keeps_its_signature():
    import functools

    def decorate(step):
        @functools.wraps(step)
        def inner(*args, **kwargs):
            return step(*args, **kwargs)

        return inner

    class Decorated(OneArgument):
        training_step = decorate(OneArgument.training_step)

    assert len(fit([ToyEntropy()], style=Decorated).losses) == 4


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(), lambda: StochasticWeightAveraging(1e-2)], ids=["ema", "swa"]
)
def test_t21_averaging_copies_neither_callbacks_nor_closures(averaging):
    """T21: copying a module with a bound-method hook copies the callback, and a closure on the copy runs the original."""
    made = []

    class Counted(ToyEntropy):
        def __deepcopy__(self, memo):
            made.append("copied")
            return self

    fit([Counted(), ToyScale()], after=[averaging()], max_epochs=2)
    assert made == []


def test_t21_a_copy_runs_its_own_weights():
    checked = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step != 2:
                return
            twin = copy.deepcopy(pl_module)
            assert torch.equal(twin(batch[0]), pl_module(batch[0]))
            for name in ("forward", "training_step", "on_save_checkpoint", "setup"):
                assert getattr(twin, name).__self__ is twin
            assert twin.model.forward.__self__ is twin.model
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert twin(batch[0]).abs().max() == 0
            assert pl_module(batch[0]).abs().max() > 0
            checked.append(True)

    fit([ToyEntropy(), ToyScale(), ToyThreshold()], after=[Copy()])
    assert checked == [True]


def test_t21_a_module_without_maps_can_be_pickled_in_training():
    class Dump(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                network = pickle.loads(pickle.dumps(pl_module.model))
                self.same = torch.equal(network(batch[0]), pl_module(batch[0]))
                self.clean = network.forward.__self__ is network

    dump = Dump()
    fit([ToyEntropy()], after=[dump])
    assert dump.same
    assert dump.clean

"""Lightning traps T1, T2, T27, T28: what is called when, and what is not called at all."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from lightning_peft.testing.callbacks import PlannedError, every_epoch
from lightning_peft.testing.modules import Configured, loader
from lightning_peft.testing.runs import assert_clean, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


def test_t01_checkpoint_path_is_unknown_in_setup(tmp_path):
    """T1: `trainer.ckpt_path` is None in `Callback.setup`, so nothing may be decided on it there."""

    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            self.path = trainer.ckpt_path

    fit([ToyEntropy()], after=[every_epoch(tmp_path)])
    look, method = Look(), ToyEntropy()
    fit([method], after=[look], resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert look.path is None
    assert method.seen["optimizer_steps"] == 8


def test_t02_golden_order_of_hooks(tmp_path):  # noqa: C901 (a tracer: many hooks, no branches)
    """T2: weights load strictly before callbacks see the checkpoint; methods attach before, bind and start after."""
    seen: list[str] = []

    class Module(Configured):
        def setup(self, stage):
            seen.append("module.setup")

        def configure_model(self):
            seen.append("module.configure_model")
            super().configure_model()

        def on_load_checkpoint(self, checkpoint):
            seen.append("module.on_load_checkpoint")

        def load_state_dict(self, *args, **kwargs):
            seen.append("module.load_state_dict")
            return super().load_state_dict(*args, **kwargs)

        def configure_optimizers(self):
            seen.append("module.configure_optimizers")
            return super().configure_optimizers()

        def on_fit_start(self):
            seen.append(f"module.on_fit_start optimizers={len(self.trainer.optimizers)}")

        def training_step(self, batch, batch_idx):
            seen.append("module.training_step")
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss):
            seen.append("module.on_before_backward")

    class Method(ToyEntropy):
        def setup(self, trainer, pl_module, stage):
            seen.append("method.setup")
            super().setup(trainer, pl_module, stage)

        def attach(self, module):
            seen.append(f"method.attach network={module.model is not None}")

        def load_state(self, state):
            seen.append("method.load_state")
            super().load_state(state)

        def start(self, run):
            seen.append(f"method.start step={run.step}")
            super().start(run)

        def loss(self, step):
            seen.append("method.loss")
            return super().loss(step)

        def after_step(self, run):
            seen.append(f"method.after_step step={run.step}")
            super().after_step(run)

        def epoch_end(self, run):
            seen.append("method.epoch_end")
            super().epoch_end(run)

        def finish(self, run):
            seen.append("method.finish")

    one_batch = {"style": Module, "data": loader(8, 8)}
    fit([Method()], after=[every_epoch(tmp_path)], **one_batch)
    seen.clear()
    fit([Method()], resume=tmp_path / "epoch=0.ckpt", max_epochs=2, **one_batch)
    assert seen == [
        "method.setup",
        "module.setup",
        "module.configure_model",
        "method.attach network=True",
        "module.on_load_checkpoint",
        "module.load_state_dict",
        "method.load_state",
        "module.configure_optimizers",
        "module.on_fit_start optimizers=1",
        "method.start step=1",
        "module.training_step",
        "method.loss",
        "module.on_before_backward",
        "method.after_step step=2",
        "method.epoch_end",
        "method.finish",
    ]


HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("first", [True, False], ids=["before-us", "after-us"])
@pytest.mark.parametrize("hook", HOOKS)
def test_t27_exceptions_skip_teardown(hook, first):
    """T27: `on_exception` is called and `teardown` is not; the module is clean wherever the exception came from."""

    def fail(*args, **kwargs):
        raise PlannedError(hook)

    called = []
    failing = Callback()
    setattr(failing, hook, fail)
    failing.teardown = lambda *args: called.append("teardown")
    failing.on_exception = lambda *args: called.append("on_exception")
    torch.manual_seed(0)
    module = Configured()
    module.configure_model()
    with pytest.raises(PlannedError):
        fit(
            [ToyEntropy(), ToyScale(), ToyThreshold()],
            module=module,
            before=[failing] if first else [],
            after=[] if first else [failing],
        )
    assert called == ["on_exception"]
    assert "parametrizations" not in str(list(module.state_dict()))
    again = fit([], module=module.train())
    assert_clean(again.module, f"an exception in {hook}")


def test_t28_setup_is_called_again():
    """T28: `setup` runs for every fit, validate and test; each attaches once and lets go."""
    attached = []

    class Counting(ToyScale):
        def attach(self, module):
            attached.append(len(list(module.parameters())))
            super().attach(module)

    run = fit([Counting(), ToyEntropy()])
    run.trainer.fit(run.module, loader(), loader(8))
    run.trainer.validate(run.module, loader(8), verbose=False)
    run.trainer.test(run.module, loader(8), verbose=False)
    assert attached == [6, 6, 6, 6]
    assert_clean(run.module, "fit, fit, validate, test of one Trainer")

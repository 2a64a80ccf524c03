from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import Lane, Loss, Method, Resource, apply_terms
from lightning_peft.compose.loss import NonFiniteLossError
from lightning_peft.testing.callbacks import FailAt, PlannedError
from lightning_peft.testing.modules import Configured, DictOutput, Manual, Plain, Root, loader, trainer
from lightning_peft.testing.runs import assert_clean, assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold
from lightning_peft.testing.trace import difference, trace

STEPS = 8


def methods():
    return [ToyEntropy(), ToyScale(), ToyThreshold()]


def same_batch_again():
    """Every batch holds the same samples, so that where in an epoch a run resumes makes no difference to the data."""
    dataset = loader(8).dataset
    return DataLoader(dataset, batch_sampler=[list(range(8))] * 4)


def each_step(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=1)


# Interrupted anywhere, resumed from "last".


@pytest.fixture
def restore_sigint():
    # Lightning ignores SIGINT for the rest of the process after a KeyboardInterrupt.
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("style", [Plain, Manual], ids=lambda style: style.__name__)
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.usefixtures("restore_sigint")
def test_ctrl_c_at_any_step_then_last(step, style, tmp_path):
    full = fit(methods(), style=style, data=same_batch_again(), max_epochs=2)
    torch.manual_seed(0)
    module = style()
    with pytest.raises(SystemExit):
        fit(
            methods(),
            module=module,
            after=[FailAt(step, KeyboardInterrupt()), each_step(tmp_path)],
            data=same_batch_again(),
            max_epochs=2,
        )
    assert_clean(module, "Ctrl-C")
    resumed = fit(
        methods(),
        style=style,
        seed=5,
        after=[each_step(tmp_path)],
        data=same_batch_again(),
        max_epochs=2,
        resume="last",
    )
    assert_same(full, resumed, f"uninterrupted against Ctrl-C before step {step} and ckpt_path='last'")


@pytest.mark.parametrize("step", [3, 4, 6])
@pytest.mark.usefixtures("restore_sigint")
def test_resume_reads_the_batches_plain_lightning_reads(step, tmp_path):
    """Lightning starts the loader over after a resume in the middle of an epoch; methods change nothing about it."""

    class Indices(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((trainer.current_epoch, batch_idx, batch[0].sum().item()))

    class Checked(ToyEntropy):
        def loss(self, step):
            inputs, labels = loader().dataset[step.sample_index]
            assert torch.equal(inputs, step.batch[0]), "the sample index is not that of this batch"
            assert torch.equal(labels, step.batch[1])
            return super().loss(step)

    seen = {}
    for name, make in (("plain", list), ("methods", lambda: [Checked(), ToyScale(), ToyThreshold()])):
        folder, indices = tmp_path / name, Indices()
        with pytest.raises(SystemExit):
            fit(make(), after=[FailAt(step, KeyboardInterrupt()), each_step(folder)], max_epochs=2)
        fit(make(), after=[each_step(folder), indices], max_epochs=2, resume="last")
        seen[name] = indices.seen
    assert seen["methods"] == seen["plain"]
    assert len(seen["plain"]) == STEPS - step


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {home!r})
from lightning.pytorch import Callback
import test_hub as here
from lightning_peft.testing.runs import fit

class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

fit(here.methods(), after=[Kill(), here.each_step({folder!r})], data=here.same_batch_again(), max_epochs=2)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_kill_9_then_last(tmp_path):
    script = KILLED.format(home=str(Path(__file__).parent), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    full = fit(methods(), data=same_batch_again(), max_epochs=2)
    resumed = fit(methods(), seed=5, after=[each_step(tmp_path)], data=same_batch_again(), max_epochs=2, resume="last")
    assert resumed.methods[0].seen["optimizer_steps"] == STEPS
    assert_same(full, resumed, "uninterrupted against kill -9 and ckpt_path='last'")


@pytest.mark.parametrize("when", ["last batch", "validation end", "before us"])
def test_an_epoch_that_ended_without_its_end_is_ended_on_resume(when, tmp_path):
    """Lightning goes on in the next epoch, and never calls `on_train_epoch_end` for a checkpoint saved just before it."""
    ends = []

    class Watch(ToyEntropy):
        def epoch_end(self, run):
            super().epoch_end(run)
            ends.append(run.epoch)

    class Early(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "step=4.ckpt")

    saver = {
        "last batch": lambda: ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1),
        "validation end": lambda: ModelCheckpoint(tmp_path, filename="{step}", save_on_train_epoch_end=False, save_top_k=-1),
        "before us": Early,
    }[when]
    full = fit([Watch(), ToyScale()], before=[saver()], max_epochs=2)
    ends.clear()
    resumed = fit([Watch(), ToyScale()], seed=3, resume=tmp_path / "step=4.ckpt", max_epochs=2)
    assert ends == [0, 1]
    assert_same(full, resumed, f"uninterrupted against a checkpoint saved at {when}")


@pytest.mark.parametrize("saver_first", [True, False])
def test_checkpoint_saved_on_exception_is_complete(saver_first, tmp_path):
    """Callbacks hear of an exception in list order: the module may be clean already when the checkpoint is written."""
    saver = ModelCheckpoint(tmp_path, filename="oops", save_on_exception=True, save_top_k=-1, every_n_epochs=100)
    with pytest.raises(PlannedError):
        fit(
            methods(),
            before=[saver] if saver_first else [],
            after=[FailAt(5)] if saver_first else [saver, FailAt(5)],
            data=same_batch_again(),
            max_epochs=2,
        )
    full = fit(methods(), data=same_batch_again(), max_epochs=2)
    resumed = fit(methods(), seed=3, data=same_batch_again(), max_epochs=2, resume=next(tmp_path.glob("oops*.ckpt")))
    assert_same(full, resumed, "uninterrupted against resumed from save_on_exception")


# Refused, and clean afterwards.


def refused(error, match, callbacks, module, **overrides):
    before, weights = trace(module), {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(error, match=match):
        fit(callbacks, module=module, **overrides)
    after = trace(module)
    for part in ("classes", "hooks", "parameters", "parameter order", "state"):
        assert difference(before[part], after[part]) is None
    assert not {"forward", "training_step", "setup", "configure_model"} & set(after["attributes"][""])
    assert difference(weights, dict(module.state_dict())) is None


class NeverAsks(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.base_loss(batch))


def test_manual_optimization_without_apply_terms():
    message = r"NeverAsks uses manual optimization, so toy_entropy .*lightning_peft.apply_terms\(self, loss\)"
    refused(MisconfigurationException, message, [ToyEntropy(), ToyScale()], NeverAsks())


def test_manual_optimization_needs_no_call_without_loss_terms():
    run = fit([ToyScale(), ToyThreshold()], style=NeverAsks)
    assert_clean(run.module, "manual optimization without terms")


class TwoNets(Plain):
    def build(self):
        self.student, self.critic = nn.Linear(16, 3), nn.Linear(16, 16)

    forward = Plain.__mro__[1].forward

    def logits(self, inputs):
        return self.student(inputs)


def test_ambiguous_network():
    refused(MisconfigurationException, r"no single network: 'student' .*'critic'.*network=", [ToyEntropy()], TwoNets())
    run = fit([ToyEntropy(network="student"), ToyScale()], style=TwoNets)
    assert run.methods[0].steps == 4


def test_methods_that_name_different_networks():
    pair = [ToyEntropy(network="student"), ToyEntropy(network="critic", name="other")]
    refused(MisconfigurationException, r"different networks: \['critic', 'student'\]", pair, TwoNets())


def test_network_that_is_not_called():
    class Unused(TwoNets):
        def logits(self, inputs):
            return self.student(inputs)

    refused(MisconfigurationException, "was not called during this training step", [ToyEntropy(network="critic")], Unused())


class Scaling(Method):
    lane = Lane.LOSS
    writes = frozenset({Resource.LOSS_SCALE})

    def loss(self, step):
        return Loss(scale=0.5)


def test_two_writers_of_the_loss_scale():
    both = [Scaling(), Scaling(name="again")]
    refused(MisconfigurationException, "again and scaling both write the scale of the base loss", both, Plain())


def test_two_masks_on_one_tensor():
    both = [ToyThreshold(), ToyThreshold(name="again")]
    refused(MisconfigurationException, r"both put a mask on model.0.weight.*exclude=\['model.0'\]", both, Plain())
    fit([ToyThreshold(exclude="model.0"), ToyThreshold(name="again", targets="model.0")])


def test_two_methods_of_one_name():
    # Lightning itself refuses two callbacks of one state_key when the Trainer is built.
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ToyScale`"):
        fit([ToyScale(targets="0"), ToyScale(targets="2")])
    fit([ToyScale(targets="0"), ToyScale(targets="2", name="second")])


class NaNLoss(Plain):
    def base_loss(self, batch):
        return super().base_loss(batch) * (math.nan if self.trainer.training else 1.0)


def test_nan_in_the_users_loss():
    refused(NonFiniteLossError, "loss your training_step returned is nan", methods(), NaNLoss())


class InfiniteTerm(Method):
    lane = Lane.LOSS

    def loss(self, step):
        return torch.tensor(math.inf)


def test_infinite_term_names_its_method():
    refused(
        NonFiniteLossError,
        "loss term of infinite_term is not finite while your own loss is",
        [InfiniteTerm(), ToyScale()],
        Plain(),
    )


def test_nan_after_some_steps_leaves_the_live_weights():
    class Late(ToyEntropy):
        def loss(self, step):
            return super().loss(step) * (math.nan if step.run.step == 2 else 1.0)

    torch.manual_seed(0)
    module = Plain()
    with pytest.raises(NonFiniteLossError, match="late"):
        fit([Late(), ToyScale()], module=module)
    assert_clean(module, "a NaN")
    assert all(p.isfinite().all() for p in module.parameters())


class SingleOnly(ToyScale):
    strategies = frozenset({"exotic"})


def test_unsupported_strategy_is_refused_every_time():
    torch.manual_seed(0)
    module = Plain()
    runner = trainer(callbacks=[SingleOnly()])
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match="single_only does not work under the single strategy"):
            runner.fit(module, loader(), loader(8))
    assert "setup" not in vars(module)


def test_attach_that_fails_half_way():
    class Half(ToyScale):
        def attach(self, module):
            super().attach(module)
            raise PlannedError("half way")

    refused(PlannedError, "half way", [Half(), ToyThreshold()], Plain())
    refused(PlannedError, "half way", [Half(), ToyThreshold()], Root())


def test_finish_that_fails_still_leaves_the_module_clean():
    class Bad(ToyEntropy):
        def finish(self, run):
            raise PlannedError("in finish")

    torch.manual_seed(0)
    module = Plain()
    with pytest.raises(PlannedError):
        fit([Bad(), ToyScale()], module=module)
    assert "parametrizations" not in str(list(module.state_dict()))
    assert not {"training_step", "setup", "on_save_checkpoint"} & set(vars(module))


# What else happens to modules and Trainers.


def test_a_trainer_that_died_silently_is_followed_by_another():
    torch.manual_seed(0)
    module = Plain()
    lost = trainer(callbacks=[ToyScale()])
    lost.state.fn = "fit"
    lost.callbacks[0].setup(lost, module, "fit")
    assert "setup" in vars(module)
    run = fit([ToyScale(), ToyEntropy()], module=module)
    assert run.methods[1].steps == 4
    assert_clean(module, "two Trainers, the first gone without teardown")


@pytest.mark.parametrize("first", [True, False], ids=["finder-first", "finder-last"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_learning_rate_finder_runs_without_methods(first, tmp_path, capfd):
    finder = LearningRateFinder(num_training_steps=10)
    method = ToyEntropy()
    run = fit(
        [method, ToyScale()],
        before=[finder] if first else [],
        after=[] if first else [finder],
        default_root_dir=tmp_path,
        data=loader(128),
    )
    assert method.seen["optimizer_steps"] == method.steps == 16
    assert_clean(run.module, "LearningRateFinder")


def test_terms_are_logged_beside_the_users_loss(tmp_path):
    run = fit(
        [ToyEntropy(), ToyScale()], style=DictOutput, logger=CSVLogger(tmp_path), log_every_n_steps=1, limit_val_batches=0
    )
    logged = run.trainer.logged_metrics
    assert {"loss", "peft/loss/base", "peft/loss/total", "peft/loss/toy_entropy"} <= set(logged)
    assert logged["peft/toy_entropy/optimizer_steps"] == 4
    assert logged["peft/loss/base"] == logged["loss"]
    assert torch.allclose(logged["peft/loss/total"], logged["peft/loss/base"] + logged["peft/loss/toy_entropy"])


def test_metrics_may_carry_a_graph(tmp_path):
    class Reports(ToyScale):
        def metrics(self, run):
            return {"norm": run.module.model[0].weight.norm(), "count": 3}

    run = fit([Reports()], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert run.trainer.logged_metrics["peft/reports/count"] == 3
    assert run.trainer.logged_metrics["peft/reports/norm"] > 0


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .*None:UserWarning")
def test_a_step_that_returns_none_is_skipped():
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    run = fit([ToyEntropy(), ToyScale()], style=Skips)
    # Lightning steps the optimizer all the same, with the gradients there are.
    assert run.methods[0].seen["optimizer_steps"] == run.trainer.global_step == 4


def test_apply_terms_without_methods_returns_the_loss():
    loss = torch.tensor(1.0)
    assert apply_terms(Plain(), loss) is loss
    assert len(fit([], style=Manual).losses) == 4


def test_a_second_fit_starts_its_clock_anew_unless_it_resumes(tmp_path):
    first = fit(methods(), after=[ModelCheckpoint(tmp_path, filename="a")])
    used = methods()
    fit(used, resume=tmp_path / "a.ckpt", max_epochs=2)
    assert used[0].steps == 8
    fit(used, max_epochs=1)
    assert used[0].steps == 4, "the step count of the resumed fit leaked into the next one"
    assert first.methods[0].steps == 4


def test_frozen_weights_can_be_mapped():
    torch.manual_seed(0)
    module = Plain()
    for parameter in module.model[0].parameters():
        parameter.requires_grad_(False)
    before = module.model[0].weight.clone()
    fit([ToyScale()], module=module)
    assert torch.allclose(module.model[0].weight, before)
    assert not module.model[0].weight.requires_grad


def test_optimizers_that_train_only_a_part():
    class Head(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model[4].parameters(), lr=0.1)

    torch.manual_seed(0)
    module = Head()
    body, head = module.model[0].weight.clone(), module.model[4].weight.clone()
    fit([ToyScale()], module=module)
    assert torch.allclose(module.model[0].weight, body)
    assert not torch.allclose(module.model[4].weight, head)


def test_configured_module_that_was_built_before_the_fit():
    torch.manual_seed(0)
    module = Configured()
    module.configure_model()
    run = fit(methods(), module=module, max_epochs=2)
    assert_clean(run.module, "fit")


def test_fit_then_more_callbacks_on_the_same_weights():
    first = fit([ToyScale()])
    weights = {name: value.clone() for name, value in first.module.state_dict().items()}
    seen = []

    class Look(ToyThreshold):
        def start(self, run):
            seen.append({n: run.module.get_submodule(n).weight.clone() for n in ("model.0", "model.2")})

    fit([Look(0.0)], module=first.module)
    assert all(torch.equal(seen[0][name], weights[f"{name}.weight"]) for name in seen[0])
    assert lightning_peft.bake(first.module) is first.module

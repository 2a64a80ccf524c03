"""Interrupted anywhere, a training goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from hub_toys import each_step, methods, same_batch_again
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from warm_python import python

from lightning_peft.testing.callbacks import FailAt, PlannedError
from lightning_peft.testing.modules import Manual, Plain, loader
from lightning_peft.testing.runs import assert_clean, assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold

STEPS = 8


@pytest.fixture
def restore_sigint():
    # Lightning ignores SIGINT for the rest of the process after a KeyboardInterrupt.
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@cache
def uninterrupted(style):
    return fit(methods(), style=style, data=same_batch_again(), max_epochs=2)


@pytest.mark.parametrize("style", [Plain, Manual], ids=lambda style: style.__name__)
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.usefixtures("restore_sigint")
def test_ctrl_c_at_any_step_then_last(step, style, tmp_path):
    full = uninterrupted(style)
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
import hub_toys as here
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
    result = python("-c", script)
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

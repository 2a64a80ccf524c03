"""What else happens to modules and Trainers: fits one after the other, what they log, what they train."""

from __future__ import annotations

import pytest
import torch
from hub_toys import methods
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_peft
from lightning_peft import apply_terms
from lightning_peft.testing.modules import Configured, DictOutput, Manual, Plain, TwoOptimizers, loader, trainer
from lightning_peft.testing.runs import assert_clean, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


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
def test_learning_rate_finder_runs_without_methods(first, tmp_path):
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


class Monitors(Callback):
    monitor = "peft/loss/total"


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 2}, [3, 4, 6, 8]),  # every third, and an epoch's last
        ({"max_epochs": None, "max_steps": 5}, [3, 4, 5]),
        ({"max_epochs": 2, "after": [Monitors()]}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
    ids=["regular", "end", "monitored"],
)
def test_losses_are_logged_where_somebody_looks_at_them(settings, steps):
    class Counts(DictOutput):
        def log_dict(self, values, **kwargs):
            assert "peft/loss/total" in values
            logged.append(self.trainer.global_step)
            super().log_dict(values, **kwargs)

    logged = []
    run = fit([ToyEntropy()], style=Counts, log_every_n_steps=3, **settings)
    assert logged == steps
    assert "peft/loss/total" in run.trainer.callback_metrics


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


def test_only_the_first_optimizer_moves_the_clock():
    run = fit([ToyScale()], style=TwoOptimizers, max_epochs=2)
    assert run.trainer.global_step == 16, "Lightning counts the steps of both"
    assert run.methods[0].steps == 8


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

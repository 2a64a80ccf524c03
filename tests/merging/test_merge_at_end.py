"""Merging the best checkpoints when a fit ends: what is kept, what is said, and beside what users have."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, MergeAtEnd, NMSparsity, merge
from lightning_peft.functional import is_nm
from lightning_peft.testing.ddp import run_ddp


class Project(LightningModule):
    """A small classifier with a validation loop, as users write them."""

    def __init__(self, norm: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Linear(16, 4))
        self.validations = 0

    def forward(self, rows):
        return self.net(rows)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validations += 1
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)


def data(seed, size=96):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 8, generator=generator)
    centres = torch.randn(8, 4, generator=torch.Generator().manual_seed(7))
    labels = (rows @ centres + 2 * torch.randn(size, 4, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(rows, labels), batch_size=16)


def fit(folder, end, *callbacks, module=None, epochs=5, ckpt=None, **settings):
    module = module or Project()
    keeper = ModelCheckpoint(folder, monitor="val_loss", save_top_k=4, save_last=True, filename="{epoch}")
    warnings.filterwarnings("ignore", message=".*exists and is not empty")  # pytest gives the filters back
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[keeper, *callbacks, *([end] if end else [])], **quiet, **settings)
    trainer.fit(module, data(0), data(1, 64), ckpt_path=ckpt)
    return module, keeper, trainer


def loss_of(module):
    rows, labels = data(1, 64).dataset.tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module.eval()(rows), labels))


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_soup_of_the_best_is_kept_where_it_is_no_worse(tmp_path):
    end = MergeAtEnd(top=3)
    module, keeper, trainer = fit(tmp_path, end, module=Project(lr=0.5))
    assert end.result.score <= end.result.best
    paths = sorted(keeper.best_k_models, key=keeper.best_k_models.get)[:3]
    assert list(end.result.models) == paths
    assert same(module.state_dict(), merge(paths))
    assert keeper.best_model_path == end.result.path == str(tmp_path / "merged.ckpt")
    assert trainer.validate(module, data(1, 64), verbose=False)[0]["val_loss"] == pytest.approx(end.result.score, abs=1e-6)
    fresh = Project()
    assert trainer.test(fresh, data(1, 64), ckpt_path="best", verbose=False)[0]["val_loss"] == pytest.approx(end.result.score)
    assert same(Project.load_from_checkpoint(end.result.path).state_dict(), module.state_dict())


def test_what_is_worse_replaces_nothing_and_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_peft.merging.merge_at_end.rank_zero_info", said.append)
    plain, *_ = fit(tmp_path / "plain", None)
    end = MergeAtEnd("task_arithmetic", top=3, base="start", scale=30.0)
    module, keeper, _ = fit(tmp_path / "merged", end)
    assert end.result.score > end.result.best
    assert end.result.path is None
    assert same(module.state_dict(), plain.state_dict())
    assert "merged.ckpt" not in os.listdir(tmp_path / "merged")
    assert "merged" not in os.path.basename(keeper.best_model_path)
    assert "as training left it" in said[0]
    asked = MergeAtEnd("task_arithmetic", top=3, base="start", scale=30.0, only_if_better=False)
    module, keeper, _ = fit(tmp_path / "asked", asked)
    assert asked.result.path == keeper.best_model_path
    start, paths = Project().state_dict(), asked.result.models
    assert same(module.state_dict(), merge(list(paths), "task_arithmetic", base=start, scale=30.0))


def test_a_greedy_soup_is_no_worse_than_the_best(tmp_path):
    end = MergeAtEnd("greedy", top=4)
    module, _, trainer = fit(tmp_path, end, epochs=6)
    assert end.result.score <= end.result.best
    assert 1 <= len(end.result.models) <= 4
    assert trainer.validate(module, data(1, 64), verbose=False)[0]["val_loss"] == pytest.approx(end.result.score, abs=1e-6)


def test_batch_norms_are_estimated_from_training_data(tmp_path):
    end = MergeAtEnd(top=3, only_if_better=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        module, *_ = fit(tmp_path, end, module=Project(norm=True))
    inner = module.net[0](data(0).dataset.tensors[0])
    assert torch.allclose(module.net[1].running_mean, inner.mean(0), atol=1e-5)
    assert module.net[1].momentum == 0.1
    assert not module.net[1].training or module.training
    assert same(torch.load(end.result.path, weights_only=True)["state_dict"], module.state_dict())


def test_beside_methods_and_in_any_order(tmp_path):
    for place, order in enumerate(((1, 0), (0, 1))):
        end = MergeAtEnd(top=3, only_if_better=False)
        callbacks = [end, NMSparsity("2:4", targets="all-linear", exclude=(), validate="baked")]
        one, two = (callbacks[each] for each in order)
        module = Project()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        keeper = ModelCheckpoint(tmp_path / str(place), monitor="val_loss", save_top_k=4)
        trainer = Trainer(max_epochs=5, callbacks=[one, keeper, two], **quiet)
        with pytest.warns(UserWarning, match="2 tensors are 2:4 in all models, under masks that differ"):
            trainer.fit(module, data(0), data(1, 64))
        assert end.result is not None
        fresh = Project.load_from_checkpoint(end.result.models[0])
        assert end.result.best == pytest.approx(loss_of(fresh), abs=1e-6), "what layers see in the file is what was judged"
        with pytest.warns(UserWarning, match="2:4"):
            merged = merge(list(end.result.models))
        assert same(module.state_dict(), merged)
        assert all(is_nm(module.net[each].weight, 2, 4) for each in (0, 3))
        assert trainer.validate(module, data(1, 64), verbose=False)[0]["val_loss"] == pytest.approx(end.result.score, abs=1e-6)


def test_callbacks_behind_it_hear_of_the_end_once(tmp_path):
    class Ends(Callback):
        heard = 0

        def on_fit_end(self, trainer, pl_module):
            self.heard += 1

    end, listener, last = MergeAtEnd(top=2), Ends(), Ends()
    module = Project()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    keeper = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    Trainer(max_epochs=2, callbacks=[end, listener, last, keeper], **quiet).fit(module, data(0), data(1, 64))
    assert (listener.heard, last.heard) == (1, 1)
    assert end.result is not None


class Widens(Callback):
    """Gives the module another head when the fit ends, as something that changes a structure would."""

    def on_train_end(self, trainer, pl_module):
        pl_module.net[3] = nn.Linear(16, 5)


def test_a_module_that_changed_since_is_left_in_words(tmp_path):
    end, module = MergeAtEnd(top=2), Project()
    with pytest.warns(UserWarning, match=r"changed since its best checkpoints: net.3.weight is \(5, 16\) now and \(4, 16\)"):
        fit(tmp_path, end, Widens(), module=module, epochs=2)
    assert end.result is None
    assert module.net[3].out_features == 5


def test_adapters_that_stay_are_refused_in_words(tmp_path):
    end = MergeAtEnd(top=2)
    with pytest.warns(UserWarning, match=r"merged nothing.*'lora' stays on the module"):
        fit(tmp_path, end, LoRA(2, targets="all-linear", exclude=(), keep=True))
    assert end.result is None


def test_a_fit_that_was_killed_while_it_merged_merges_when_it_is_resumed(tmp_path, monkeypatch):
    whole, *_ = fit(tmp_path / "whole", MergeAtEnd(top=3, only_if_better=False))

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_peft.merging.merge_at_end.merge", dies)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - Lightning turns it into a SystemExit or lets it through
            fit(tmp_path / "killed", MergeAtEnd(top=3, only_if_better=False))
    assert "merged.ckpt" not in os.listdir(tmp_path / "killed")
    end = MergeAtEnd(top=3, only_if_better=False)
    module, *_ = fit(tmp_path / "killed", end, ckpt=tmp_path / "killed/last.ckpt")
    assert end.result is not None
    assert same(module.state_dict(), whole.state_dict())


def test_it_takes_a_data_module_and_leaves_its_trainer(tmp_path):
    class Rows(LightningDataModule):
        def train_dataloader(self):
            return data(0)

        def val_dataloader(self):
            return data(1, 64)

    end, rows, module = MergeAtEnd(top=2), Rows(), Project()
    keeper = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=3, callbacks=[keeper, end], limit_val_batches=2, **quiet)
    trainer.fit(module, datamodule=rows)
    assert end.result is not None
    assert module._trainer is trainer
    assert rows.trainer is trainer
    assert module.validations == 2 * (1 + 3 + 2)  # the sanity check, three epochs, the best and the merged one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergeAtEnd(top=1), "two checkpoints are the least"),
        (lambda: MergeAtEnd("tie"), "Did you mean ties"),
        (lambda: MergeAtEnd("ties"), 'Give base="start"'),
        (lambda: MergeAtEnd("soup", densty=1.0), "no option 'densty'"),
        (lambda: MergeAtEnd("greedy", density=1.0), "takes no options"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, message):
    with pytest.raises(Exception, match=message):
        make()


def test_a_trainer_that_keeps_too_little_is_refused_before_the_training(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for keeper, message in (
        (ModelCheckpoint(tmp_path), "nothing keeps several"),
        (ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1), "nothing keeps several"),
        (ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3), r"save_top_k=3\) keeps 3. Raise save_top_k"),
    ):
        module = Project()
        with pytest.raises(Exception, match=message):
            Trainer(max_epochs=2, callbacks=[keeper, MergeAtEnd(top=5)], **quiet).fit(module, data(0), data(1))
        assert same(module.state_dict(), Project().state_dict())


def test_too_few_checkpoints_and_a_metric_of_training_are_said(tmp_path):
    end = MergeAtEnd(top=3)
    with pytest.warns(UserWarning, match="there are 1 checkpoints"):
        fit(tmp_path / "few", end, epochs=1)
    assert end.result is None
    end, module = MergeAtEnd(top=2), Project()
    keeper = ModelCheckpoint(tmp_path / "train", monitor="train_loss_epoch", save_top_k=2, save_on_train_epoch_end=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with pytest.warns(UserWarning, match=r"judges by 'train_loss_epoch'.*it logs val_loss"):
        Trainer(max_epochs=3, callbacks=[keeper, end], **quiet).fit(module, data(0), data(1))
    assert end.result is None


def on_rank(folder):
    torch.manual_seed(0)
    end = MergeAtEnd(top=2, only_if_better=False)
    module, keeper, _ = fit(folder, end, epochs=3, strategy="ddp", devices=2)
    return {**module.state_dict(), "score": torch.tensor(end.result.score), "best": keeper.best_model_path}


def test_two_processes_hold_the_same_merged_model(tmp_path):
    one, two = run_ddp(f"{__file__}:on_rank", {"folder": str(tmp_path)}, processes=2)
    assert one["best"] == two["best"] == str(tmp_path / "merged.ckpt")
    assert one["score"] == two["score"]
    merged = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], merged[name]) for name in merged)

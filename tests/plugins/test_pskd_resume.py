"""PSKD's memory in checkpoints: resumed bit-exactly, refused where it does not fit, forgotten by a new training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from pskd_toys import SIZE, Lit, Losses, close, epoch_loader, fit, loader, trainer

from lightning_peft_plugins.regularizers.pskd import PSKD


class SaveAt(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


@pytest.mark.parametrize("teacher", ["memory", "copy"])
@pytest.mark.parametrize("storage", ["ram", "mapped"])
def test_resume_at_an_epoch_boundary_is_bit_exact(tmp_path: Path, teacher: str, storage: str) -> None:
    file = tmp_path / "epoch0.ckpt"
    options: dict[str, Any] = {"teacher": teacher, "memory": storage}
    full = Lit(dropout=0.0)
    losses = fit(PSKD(0.8, **options), full, epoch_loader(), callbacks=[SaveAt(file, 6)], default_root_dir=tmp_path)
    torch.load(file, weights_only=True)
    resumed = Lit(dropout=0.0)
    rest = fit(PSKD(0.8, **options), resumed, epoch_loader(), ckpt_path=file, default_root_dir=tmp_path)
    assert rest == losses[6:]
    assert close(full, resumed, 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0.ckpt"]


@pytest.mark.filterwarnings("ignore:pskd. this fit ended after:UserWarning")  # on purpose, in two parts
def test_saved_after_the_fit_resumes(tmp_path: Path) -> None:
    file = tmp_path / "done.ckpt"
    whole = fit(PSKD(0.8, epochs=3), Lit(dropout=0.0), epoch_loader())
    losses, method = Losses(), PSKD(0.8, epochs=3)
    short = trainer(method, losses, max_epochs=2)
    short.fit(Lit(dropout=0.0), epoch_loader())
    short.save_checkpoint(file, weights_only=False)
    assert fit(PSKD(0.8, epochs=3), Lit(dropout=0.0), epoch_loader(), ckpt_path=file) == whole[12:]


def test_resume_refuses_another_dataset_or_head(tmp_path: Path) -> None:
    file = tmp_path / "epoch0.ckpt"
    fit(PSKD(0.8), Lit(), epoch_loader(), callbacks=[SaveAt(file, 6)])
    with pytest.raises(MisconfigurationException, match="of 22 training samples, but the training dataset now has 24"):
        fit(PSKD(0.8), Lit(), epoch_loader(size=24), ckpt_path=file)
    method = PSKD(0.8)
    saved = torch.load(file, weights_only=True)
    saved["callbacks"]["lightning_peft/pskd"]["state"]["probabilities"] = torch.full((SIZE, 7), 1 / 7)
    torch.save(saved, file)
    with pytest.raises(MisconfigurationException, match="over 7 classes, but the network now returns 4"):
        fit(method, Lit(), epoch_loader(), ckpt_path=file)
    with pytest.raises(MisconfigurationException, match="teacher='memory'"):
        fit(PSKD(0.8, teacher="copy"), Lit(), epoch_loader(), ckpt_path=file)
    saved["callbacks"]["lightning_peft/pskd"]["state"]["seen"] = torch.ones(3)
    torch.save(saved, file)
    with pytest.raises(MisconfigurationException, match="malformed"):
        fit(PSKD(0.8), Lit(), epoch_loader(), ckpt_path=file)


@pytest.mark.filterwarnings("ignore:pskd. this fit ended after:UserWarning")  # on purpose, in two parts
def test_a_new_training_forgets_and_a_continued_one_remembers() -> None:
    method = PSKD(0.8, epochs=4)
    first = fit(method, Lit(dropout=0.0), epoch_loader())
    assert fit(method, Lit(dropout=0.0), epoch_loader()) == first
    losses, module = Losses(), Lit(dropout=0.0)
    run = trainer(PSKD(0.8, epochs=4), losses, max_epochs=2)
    run.fit(module, epoch_loader())
    run.fit_loop.max_epochs = 3
    run.fit(module, epoch_loader())
    assert losses.seen[12] == pytest.approx(first[12], abs=1e-6)  # later steps differ: Lightning makes a new optimizer


def test_state_is_plain_data() -> None:
    method = PSKD(0.8)
    fit(method, Lit(), loader())
    buffer = io.BytesIO()
    torch.save(method.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)["state"]) == {"teacher", "fixed", "probabilities", "seen"}

"""Trainings whose structure changes go on bit for bit from every single step, and from a file saved when they were over."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_peft import PSKD, BlockPruning, LayerGrowth, MaskedPruning, NMSparsity, StageSharing
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, deepened, loader
from lightning_peft.testing.runs import assert_same, fit

STEPS, EPOCHS = 4, 3
COMBINATIONS = {
    "masks held for some steps": lambda: [LayerGrowth("zero", at="step:3", start=2), NMSparsity("1:4", "sr-ste", refresh=3)],
    "masks held for good": lambda: [LayerGrowth("stack", at="step:5", start=2), NMSparsity("2:4", "one-shot", dense=2)],
    "masks by amount": lambda: [LayerGrowth("stack", at="step:3", start=2), MaskedPruning(0.5, end=8, every=2)],
    "shared blocks": lambda: [StageSharing(2, at="step:6"), NMSparsity("1:4", "sr-ste", refresh=4)],
    "a teacher that is grown": lambda: [LayerGrowth("zero", at="step:6", start=2), PSKD(teacher="copy")],
    "a teacher that is cut": lambda: [BlockPruning(0.5, start=5, end=10, every=2), PSKD(teacher="copy")],
}


def same_batches() -> DataLoader:
    """Every batch holds the same samples, so that where in an epoch a run resumes makes no difference to the data."""
    return DataLoader(loader(8).dataset, batch_sampler=[list(range(8))] * STEPS)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_changing_training_goes_on_from_every_step(name: str, tmp_path: Path) -> None:
    make, settings = COMBINATIONS[name], {"style": deepened(Plain), "data": same_batches(), "max_epochs": EPOCHS}
    each = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(make(), after=[each, every_epoch(tmp_path)], **settings)
    files = [tmp_path / f"step={step}.ckpt" for step in range(1, STEPS * EPOCHS) if step % STEPS]
    for file in [*files, *(tmp_path / f"epoch={epoch}.ckpt" for epoch in range(EPOCHS))]:
        resumed = fit(make(), resume=file, seed=9, **settings)
        assert_same(whole, resumed, f"{name}: uninterrupted against resumed from {file.stem}")

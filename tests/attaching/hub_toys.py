"""Methods, batches and checkpoints that tests of the hub and a killed process share."""

from __future__ import annotations

from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_peft.testing.modules import loader
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold


def methods():
    return [ToyEntropy(), ToyScale(), ToyThreshold()]


def same_batch_again():
    """Every batch holds the same samples, so that where in an epoch a run resumes makes no difference to the data."""
    dataset = loader(8).dataset
    return DataLoader(dataset, batch_sampler=[list(range(8))] * 4)


def each_step(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=1)

"""A classifier and data with two shifts, small enough to adapt in a blink; recipes of the tests name them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class BlobModule(LightningModule):
    """Knows nothing of adaptation."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


class BlobData(LightningDataModule):
    """Three classes around three centres; "scaled" has severities, "moved" is natural."""

    shift_note = "Blobs, scaled or moved."

    def __init__(self, samples: int = 90, batch_size: int = 16) -> None:
        super().__init__()
        self.samples, self.batch_size = samples, batch_size

    def shifts(self):
        return {"scaled": (1, 2, 3), "moved": ()}

    def shifted(self, shift: str, severity: int) -> Dataset:
        data = self._blobs(seed=1)
        x, y = data.tensors
        return TensorDataset(x * (1 + severity) if shift == "scaled" else x + 1.5, y)

    def _blobs(self, seed: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(seed)
        y = torch.arange(self.samples) % 3
        x = torch.randn(self.samples, 8, generator=draw)
        x[torch.arange(self.samples), y] += 3
        return TensorDataset(x, y)

    def train_dataloader(self):
        return DataLoader(self._blobs(seed=0), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self._blobs(seed=2), self.batch_size)

    def test_dataloader(self):
        return DataLoader(self._blobs(seed=1), self.batch_size)


class PlainData(BlobData):
    """The same, of another kind: it has no shifts."""

    shifts = None

"""Loaders of a data module's splits."""

from __future__ import annotations

from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader


class SplitLoaders(LightningDataModule):
    """Data of three splits, ``train``, ``val`` and ``test``; subclasses define :meth:`loader`."""

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        """Return the batches of a split."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        """Training data, shuffled."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation data."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test data."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Test data."""
        return self.loader("test")

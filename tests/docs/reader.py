"""What a reader of the documentation has: a small residual network, its data, and the names the pages take for granted."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_peft

CHANNELS, SIZE, CLASSES = 16, 8, 4


class Block(nn.Module):
    """A residual block, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(images))))) + images)


class MyModule(LightningModule):
    """Classifies images; asks Lightning for nothing and knows nothing of this library.

    Attributes:
        steps: Training steps that this object has made, over all fits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        parts = {
            "stem": nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False),
            "norm": nn.BatchNorm2d(CHANNELS),
            "act": nn.ReLU(),
            "layer1": Block(),
            "layer2": nn.Sequential(*(Block() for _ in range(4))),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flat": nn.Flatten(),
            "neck": nn.Linear(CHANNELS, CHANNELS),
            "fc": nn.Linear(CHANNELS, CLASSES),
        }
        self.model = nn.Sequential(OrderedDict(parts))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def _loss(self, batch: Any) -> Tensor:
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        return F.cross_entropy(self(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Indexed(Dataset[dict[str, Any]]):
    """A dataset whose samples say which they are."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return {"image": image, "label": label, "index": index}


class Changing:
    """Data under two shifts, also at once."""

    def __init__(self) -> None:
        self.clean = TensorDataset(torch.randn(16, 3, SIZE, SIZE), torch.arange(16) % CLASSES)

    def shifts(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("fog", "snow"), (1, 2, 3, 4, 5))

    def shifted(self, shift: str, severity: int) -> TensorDataset:
        return TensorDataset(self.clean.tensors[0] / severity, self.clean.tensors[1])

    def shifted_twice(self, shift: str, severity: int, second: str, second_severity: int) -> TensorDataset:
        return self.shifted(second, severity * second_severity)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.clean, batch_size=16)


class ShortTrainer(Trainer):
    """For pages that do not import Trainer: at most 10 epochs, and nothing printed."""

    def __init__(self, max_epochs: int = 2, **options: Any) -> None:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        super().__init__(max_epochs=min(max_epochs, 10), **quiet, **options)


class OnAnyDevice(nn.Sequential):
    """A network whose ``cuda()`` stays where it is when there is no GPU."""

    def cuda(self, device: int | None = None) -> nn.Sequential:
        return super().cuda(device) if torch.cuda.is_available() else self


def names(folder: Path) -> dict[str, Any]:
    """Return what a page's code may use without saying where it comes from, and put the files it reads into the folder."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, SIZE, SIZE), torch.arange(16) % CLASSES)
    loader = DataLoader(data, batch_size=16)
    module, dense = MyModule(), MyModule()
    trainer = ShortTrainer(max_epochs=1)
    trainer.fit(module, loader)
    for name in ("trained.ckpt", "last.ckpt", "model.ckpt"):
        trainer.save_checkpoint(folder / name)
    loaders = ("my_loader", "my_data", "train_loader", "val_loader", "test_loader", "clean_loader", "shifted_loader")
    given: dict[str, Any] = dict.fromkeys((*loaders, "loader", "data"), loader)
    images = data.tensors[0][:4]
    exec("from lightning_peft import *", given)
    return given | {
        "lightning_peft": lightning_peft,
        "torch": torch,
        "Trainer": ShortTrainer,
        "ModelCheckpoint": ModelCheckpoint,
        "MyModule": MyModule,
        "my_module": module,
        "trainer": trainer,
        "module": module,
        "dense": dense,
        "images": images,
        "some_real_inputs": images,
        "indexed": DataLoader(Indexed(data), batch_size=16),
        "network": OnAnyDevice(nn.Linear(64, 64)),
    }

"""What the pruning benchmarks train: two small timm networks on CIFAR-10, and EfficientNet-Lite0 on the grocery photos.

Training is sized for two CPU cores: a part of CIFAR-10's images, few epochs, one thread a process. Each dense network is
trained once a seed and kept in the work folder; every pruned one starts from it.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_peft_recipes.cifar10 import CIFAR10DataModule
from lightning_peft_recipes.classification import ImageClassifier
from lightning_peft_recipes.groceries import GroceriesDataModule
from lightning_peft_recipes.image_classifier import TimmClassifier

# Large results are given back to the system and taken again at every call otherwise, and the pages cost more than the work:
# on a virtual machine a dense network ran at half its speed. Read when a process starts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_TOP_PAD_": "67108864"}


def keep_memory() -> None:
    """Start the program again with glibc told to keep memory, unless it is."""
    if not all(key in os.environ for key in ALLOCATOR):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def spread(values: Sequence[float], digits: int) -> str:
    """Mean of some values, lowest and highest in brackets.

    Example:
        >>> spread([1.0, 2.0, 4.5], 1)
        '2.5 (1.0 to 4.5)'
    """
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


class SmallTimm(ImageClassifier):
    """A timm network of the family ``name`` for images of 32 pixels, with random weights.

    Args:
        name: ``"resnet"``: ResNet-18 of a quarter of the width, first convolution 3x3 without stride, no pooling after it;
            ``"mobilenet"``: MobileNetV2 of half the width, first convolution without stride.
        lr: Peak learning rate.
        optimizer: ``"sgd"`` or ``"adamw"``.
    """

    def __init__(self, name: str, lr: float, optimizer: Literal["sgd", "adamw"] = "sgd") -> None:
        super().__init__(10, optimizer, lr, 1.0, 5e-4 if optimizer == "sgd" else 0.01, 0.1)
        self.save_hyperparameters()
        network: Any
        if name == "resnet":
            network = timm.create_model("resnet18", num_classes=10, channels=(16, 32, 64, 128))
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        else:
            network = timm.create_model("mobilenetv2_050", num_classes=10)
            network.conv_stem.stride = (1, 1)
        self.model = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def head(self) -> nn.Module:
        """The output layer."""
        return self.model.get_classifier()


@dataclass(frozen=True)
class Setting:
    """How a network is trained, densely and while it is pruned.

    Attributes:
        pointwise: Whether masks act on pointwise convolutions only, as in mobile networks, or on all.
        precision: Lightning's precision; what is quicker on a CPU with bfloat16 units.
        epochs: Of the dense training.
        lr: Of the dense training.
        pruned_epochs: Of a training with a pruning method, from the dense network.
        pruned_lr: Of that training.
        ftwt_lr: Of that training with FTWT, on AdamW: with SGD at such rates predictors learn nothing in so few steps.
    """

    pointwise: bool
    precision: Any
    epochs: int
    lr: float
    pruned_epochs: int
    pruned_lr: float
    ftwt_lr: float


SETTINGS = {
    "resnet": Setting(False, "bf16-mixed", 12, 0.1, 2, 0.02, 5e-4),
    "mobilenet": Setting(True, "32-true", 12, 0.1, 2, 0.02, 5e-4),
    "lite0": Setting(True, "32-true", 4, 5e-4, 3, 2e-4, 2e-4),
}
TRAIN_IMAGES, TEST_IMAGES = 8_000, 5_000  # of CIFAR-10's 45,000 and 10,000


def build(name: str, lr: float, optimizer: Literal["sgd", "adamw"] = "sgd") -> Any:
    """The LightningModule of a benchmark; the optimizer is that of the small networks."""
    if name == "lite0":
        return TimmClassifier(lr=lr, head_lr_scale=10 if lr == SETTINGS[name].lr else 1)
    return SmallTimm(name, lr, optimizer)


def data_of(name: str) -> LightningDataModule:
    """The data module of a benchmark."""
    data: Any
    if name == "lite0":
        data = GroceriesDataModule(image_size=128, batch_size=16, eval_batch_size=32)
    else:
        sizes: dict[str, Any] = {"train_size": TRAIN_IMAGES, "val_size": 1000, "test_size": TEST_IMAGES}
        data = CIFAR10DataModule(batch_size=128, eval_batch_size=250, **sizes)
    data.prepare_data()
    return data


def trainer(epochs: int, callbacks: Sequence[Callback], precision: Any = "32-true", **settings: Any) -> Trainer:
    """A quiet Trainer on the CPU that neither validates nor saves."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed: dict[str, Any] = {**quiet, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "log_every_n_steps": 10}
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), precision=precision, **fixed | settings)


def dense(name: str, seed: int, work: Path, epochs: int | None = None) -> Path:
    """Train the dense network of a seed, unless that is done, and return its checkpoint."""
    setting = SETTINGS[name]
    epochs = epochs or setting.epochs
    path = work / f"{name}-{seed}-dense{'' if epochs == setting.epochs else epochs}.ckpt"
    if not path.exists():
        seed_everything(seed, verbose=False)
        module, start = build(name, setting.lr), time.perf_counter()
        runner = trainer(epochs, [], setting.precision)
        runner.fit(module, datamodule=data_of(name))
        runner.save_checkpoint(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return path


def from_dense(name: str, start: Path, lr: float, optimizer: Literal["sgd", "adamw"] = "sgd") -> Any:
    """A module with the weights of a dense checkpoint and another learning rate."""
    module = build(name, lr, optimizer)
    module.load_state_dict(torch.load(start, weights_only=True)["state_dict"])
    return module


def tested(module: Any, name: str) -> dict[str, float]:
    """Accuracy and calibration error on the test images."""
    found = trainer(1, []).test(module, datamodule=data_of(name), verbose=False)[0]
    return {"accuracy": found["test/accuracy"], "calibration_error": found["test/ece"]}


def kept(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Write the figures of one run to its file, and return them."""
    path.write_text(json.dumps(found, indent=1))
    return found

"""CIFAR-10: 60,000 colour images of 32 pixels in ten classes, with the corruptions of its test images.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The pinned package holds all of it, without
loss and in the original order, that of ``torchvision.datasets.CIFAR10``.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.assets import cache_dir, derived, open_members
from lightning_peft_recipes.assets import CIFAR10
from lightning_peft_recipes.image_data import Batch, ImageDataModule, Prepare
from lightning_peft_recipes.subsets import stratified, subset_count

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Names of the classes, in the order of their labels."""

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
HELD_OUT = 0.1  # of the training images: CIFAR-10 comes without validation images
SIDE = 32


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 as ``(image, label)`` batches: 45,000 images for training, 5,000 for validation, 10,000 for test.

    Packaged images are decoded once into the asset cache. Batches are float, shape ``[batch, 3, 32, 32]``, each channel with
    mean 0 and deviation 1 over the training images; labels are class indices of :data:`CLASSES`. The test images are to be had
    under the 15 common corruptions too (:mod:`~lightning_peft_recipes.corruptions`).

    Args:
        source: ``"packaged"`` for the pinned package, or ``"torchvision"`` for torchvision's own download.
        batch_size: Images per batch. An incomplete last training batch is dropped.
        eval_batch_size: Images per batch in validation and test; ``None`` is as in training.
        augment: Random crops of the image padded by four pixels, and flips, drawn from torch's random state.
        train_size: Training images to use, stratified and deterministic: a share in (0, 1), a number, or ``None`` for all.
        val_size: Validation images to use.
        test_size: Test images to use.
        corruption_seed: Chooses the random numbers of the corruptions.
        num_workers: Loader processes. The images are in memory, so 0 is usually fastest.

    Raises:
        MisconfigurationException: An optional library is missing, an argument is out of range, or the source is unknown.
    """

    num_classes = len(CLASSES)
    asset = CIFAR10

    def __init__(
        self,
        source: Literal["packaged", "torchvision"] = "packaged",
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        augment: bool = True,
        train_size: float | None = None,
        val_size: float | None = None,
        test_size: float | None = None,
        corruption_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, corruption_seed, num_workers)
        if source not in ("packaged", "torchvision"):
            raise MisconfigurationException(f'source={source!r} must be "packaged" or "torchvision"')
        self.source, self.augment = source, augment
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for size in self.sizes.values():
            subset_count(size, 1)  # refuse a bad value now, not after the download

    def prepare_data(self) -> None:
        """Fetch the images, and decode the packaged ones, into the asset cache."""
        for part in ("train", "test"):
            _torchvision(part, download=True) if self.source == "torchvision" else _decoded(part)

    def preparation(self, split: str) -> Prepare:
        """Scaling; random crops before it in training."""
        return training_images if self.augment and split == "train" else normalise

    def test_name(self) -> str:
        """Data set and source."""
        return f"cifar10-{self.source}"

    def load(self, split: str) -> tuple[Tensor, Tensor, list[int]]:
        """The chosen images of a split."""
        part = "test" if split == "test" else "train"
        if self.source == "torchvision":
            images, labels = _torchvision(part)
        else:
            with np.load(_decoded(part), allow_pickle=False) as arrays:
                images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
        members = torch.arange(len(labels))
        if split != "test":
            held_out = stratified(labels, subset_count(HELD_OUT, len(labels)), seed=1)
            members = held_out if split == "val" else members[~torch.isin(members, held_out)]
        chosen = members[stratified(labels[members], subset_count(self.sizes[split], len(members)))]
        return images[chosen], labels[chosen], chosen.tolist()


def random_crops(images: Tensor) -> Tensor:
    """Shift each image by up to four pixels either way, mirrored at the borders, and flip half of them.

    Args:
        images: Shape ``[batch, channels, height, width]``.

    Returns:
        Same shape and dtype.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(images.dtype)
    rows = torch.randint(0, 9, (batch, 1)) + torch.arange(height)
    columns = torch.randint(0, 9, (batch, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns, columns.flip(1))
    planes = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[(*planes, rows[:, None, :, None], columns[:, None, None, :])]


def training_images(images: Tensor) -> Tensor:
    """:func:`random_crops`, scaled."""
    return normalise(random_crops(images))


def normalise(images: Tensor) -> Tensor:
    """Scale uint8 pixels so that each channel has mean 0 and deviation 1 over CIFAR-10's training images."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return images.float().sub_(mean).div_(std)


def _torchvision(part: str, download: bool = False) -> Batch:
    try:
        import torchvision
    except ImportError as error:
        raise MisconfigurationException(f'source="torchvision" needs: pip install torchvision ({error})') from error
    data = torchvision.datasets.CIFAR10(cache_dir() / "torchvision", train=part == "train", download=download)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)


def _decoded(part: str) -> Path:
    return derived(CIFAR10, f"cifar10-{part}.npz", partial(_decode, part=part))


def _decode(path: Path, part: str) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise MisconfigurationException(f'CIFAR-10 needs: pip install "lightning-peft[vision]" ({error})') from error
    # Each sheet is 10,000 pixels high and 1,024 wide: an image a row.
    sheets = ["test_batch"] if part == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    names = [*(f"{sheet}.png" for sheet in sheets), f"{part}_lables.json"]  # spelt so in the package
    *files, stored = open_members(CIFAR10, [f"package/{name}" for name in names])
    pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    images = np.concatenate(pixels).reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)
    labels = json.loads(stored.read())
    np.savez(path, images=np.ascontiguousarray(images), labels=np.array(labels, dtype=np.int64))

"""What the image data modules share: images in memory, prepared batch by batch, and the test images under corruptions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.assets import Asset
from lightning_peft_recipes.corruptions import CORRUPTIONS, NOTE, SEVERITIES, cached_corruption
from lightning_peft_recipes.split_loaders import SplitLoaders

Batch = tuple[Tensor, Tensor]
Prepare = Callable[[Tensor], Tensor]


class ImageDataModule(SplitLoaders):
    """Base of the image data modules; a subclass says which images a split has, and how they become a batch.

    Args:
        batch_size: Images per batch. An incomplete last training batch is dropped.
        eval_batch_size: Images per batch in validation and test; ``None`` is as in training.
        corruption_seed: Chooses the random numbers of the corruptions.
        num_workers: Loader processes. The images are in memory, so 0 is usually fastest.
    """

    asset: Asset
    shift_note = NOTE

    def __init__(self, batch_size: int, eval_batch_size: int | None, corruption_seed: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.corruption_seed, self.num_workers = corruption_seed, num_workers
        self._splits: dict[str, TensorDataset] = {}
        self._test_indices: list[int] = []

    @abstractmethod
    def load(self, split: str) -> tuple[Tensor, Tensor, list[int]]:
        """Images of ``"train"``, ``"val"`` or ``"test"`` (uint8, ``[images, 3, height, width]``), labels, and their numbers."""

    @abstractmethod
    def preparation(self, split: str) -> Prepare:
        """What turns stacked uint8 images of a split into the network's input; can be pickled."""

    @abstractmethod
    def test_name(self) -> str:
        """Which test images these are, but for their number and size; part of a file name."""

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that ``stage`` (``fit``, ``validate``, ``test``, ``predict``; ``None`` for all) needs."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in wanted.get(stage or "", ("train", "val", "test")):
            if split not in self._splits:
                images, labels, numbers = self.load(split)
                self._splits[split] = TensorDataset(images, labels)
                if split == "test":
                    self._test_indices = numbers

    def shifts(self) -> dict[str, tuple[int, ...]]:
        """The 15 common corruptions, each at severities 1 to 5."""
        return dict.fromkeys(CORRUPTIONS, SEVERITIES)

    def shifted(self, shift: str, severity: int) -> TensorDataset:
        """The test images under a corruption, in the same order; generated once, then read from the asset cache.

        Whole stored images are corrupted, before anything is cut out of them.

        Args:
            shift: A corruption, also one of the four extra ones.
            severity: 1 to 5.

        Raises:
            MisconfigurationException: The optional package is missing, or an argument is out of range.
        """
        images, labels = self._splits["test"].tensors
        return TensorDataset(self._corrupted(images, self._test_subset(), shift, severity), labels)

    def shifted_twice(self, shift: str, severity: int, second: str, second_severity: int) -> TensorDataset:
        """The test images under a corruption, and another on top of it, in the same order; generated once.

        Args:
            shift: A corruption.
            severity: 1 to 5.
            second: A corruption.
            second_severity: 1 to 5.

        Raises:
            MisconfigurationException: The optional package is missing, or an argument is out of range.
        """
        images, labels = self._splits["test"].tensors
        once = self._corrupted(images, self._test_subset(), shift, severity)
        subset = f"{self._test_subset()}-{shift}-{severity}"
        return TensorDataset(self._corrupted(once, subset, second, second_severity), labels)

    def _test_subset(self) -> str:
        images = self._splits["test"].tensors[0]
        return f"{self.test_name()}-{images.shape[-1]}px-test-{len(images)}"

    def _corrupted(self, images: Tensor, subset: str, shift: str, severity: int) -> Tensor:
        return cached_corruption(
            self.asset, subset, images, shift, severity, seed=self.corruption_seed, indices=self._test_indices
        )

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[Batch]:
        data = self._splits[split]
        return DataLoader(
            data,
            batch_size=self.batch_size if split == "train" else self.eval_batch_size or self.batch_size,
            shuffle=shuffle,
            # A last batch of three images would spoil BatchNorm statistics.
            drop_last=shuffle and len(data) >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=partial(_collate, prepare=self.preparation(split)),
        )


def _collate(samples: list[Batch], prepare: Prepare) -> Batch:
    images, labels = zip(*samples, strict=True)
    return prepare(torch.stack(images)), torch.stack(labels)

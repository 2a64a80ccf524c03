"""Which dataset samples a training batch is made of, without a change to the user's dataset or ``training_step``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.attach.shim import Shim

FIX = 'Give the index in the batch instead: sample_index="<key or position>", for instance sample_index="index" or "2".'


class RecordingBatchSampler:
    """Passes a batch sampler through and remembers what it yielded, in order.

    A ``DataLoader`` returns batches in the order its batch sampler yields them, whatever its workers and prefetching do, so the
    k-th batch that arrives is the k-th list yielded since the iteration began.

    Args:
        inner: The loader's own batch sampler; its other attributes stay reachable (Lightning calls ``set_epoch`` on them).
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.pending: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        # A new deque, so that an iterator somebody still holds from an earlier epoch writes into the old one.
        self.pending = pending = deque[list[int]]()
        for batch in self.inner:
            pending.append([int(index) for index in batch])
            yield batch

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "pending"):
            raise AttributeError(name)
        return getattr(self.inner, name)


class SampleRecorder:
    """Follows the training loader of one run.

    Args:
        trainer: The Trainer whose strategy is given every loader it will use.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loaders: list[DataLoader[Any]] = []
        self._problem: str | None = "The training loader was not seen yet."
        self._current: list[int] | None = None

    @property
    def size(self) -> int:
        """Number of samples in the training dataset.

        Raises:
            MisconfigurationException: The loader's samples cannot be counted.
        """
        return len(self._loader().dataset)  # type: ignore[arg-type]

    def install(self) -> Shim:
        """Watch ``strategy.process_dataloader``, which sees loaders after Lightning gave them a distributed sampler."""
        return Shim(self._trainer.strategy, "process_dataloader", self._process).install()

    def remove(self) -> None:
        """Give the loaders back their own batch samplers."""
        for loader in self._loaders:
            recorder = loader.__dict__["batch_sampler"]
            if isinstance(recorder, RecordingBatchSampler):
                loader.__dict__["batch_sampler"] = recorder.inner
        self._loaders.clear()

    def advance(self) -> None:
        """Note that the next training batch has arrived."""
        self._current = None
        if self._problem is None:
            pending = self._recording().pending
            self._current = pending.popleft() if pending else None

    def indices(self) -> Tensor:
        """Return the dataset positions of the batch at hand, shape ``(batch,)``, int64.

        Raises:
            MisconfigurationException: The loader does not tell; the message says what to do.
        """
        self._loader()
        if self._current is None:
            raise MisconfigurationException(f"This batch did not come from the recorded training loader. {FIX}")
        return torch.tensor(self._current, dtype=torch.int64)

    def _loader(self) -> DataLoader[Any]:
        if self._problem is not None:
            raise MisconfigurationException(f"{self._problem} {FIX}")
        return self._loaders[-1]

    def _recording(self) -> RecordingBatchSampler:
        recording: RecordingBatchSampler = self._loaders[-1].__dict__["batch_sampler"]
        return recording

    def _process(self, inner: Callable[[Any], Any], loader: Any) -> Any:
        loader = inner(loader)
        if not self._trainer.training:
            return loader
        self._problem = self._why_not(loader)
        if self._problem is None:
            # DataLoader refuses the assignment once it is built, but reads the attribute for every new iterator.
            loader.__dict__["batch_sampler"] = RecordingBatchSampler(loader.batch_sampler)
            self._loaders.append(loader)
        return loader

    @staticmethod
    def _why_not(loader: Any) -> str | None:
        if not isinstance(loader, DataLoader):
            return f"The training loader is a {type(loader).__name__}, whose sample order is not known."
        if isinstance(loader.dataset, IterableDataset):
            return "The training dataset is iterable, so its samples have no index."
        if loader.batch_sampler is None:
            return "The training loader has batching switched off (batch_size=None), so its samples have no index."
        if not getattr(loader, "in_order", True):
            return "The training loader was built with in_order=False, so batches arrive in any order."
        return None

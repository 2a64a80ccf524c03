"""Which dataset samples a training batch is made of, without a change to the user's dataset or ``training_step``."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.attach.shim import Shim

FIX = 'Give the index in the batch instead: sample_index="<key or position>", for instance sample_index="index" or "2".'


class Draws:
    """One pass over a batch sampler; ``pending`` holds what was drawn and has not arrived yet, ``None`` where no positions.

    A ``DataLoader`` returns batches in the order its batch sampler yields them, whatever its workers and prefetching do, so the
    k-th batch that arrives is the k-th one drawn in the same pass.
    """

    def __init__(self, batch_sampler: Iterable[Any]) -> None:
        self.pending: deque[list[int] | None] = deque()
        self._inner = iter(batch_sampler)

    def __iter__(self) -> Draws:
        return self

    def __next__(self) -> Any:
        batch = next(self._inner)
        try:
            self.pending.append([int(index) for index in batch])
        except (TypeError, ValueError):
            self.pending.append(None)
        return batch


class RecordingBatchSampler:
    """Stands in for a batch sampler and knows the passes over it that are still alive.

    Attributes are read from and written to the inner sampler, so ``set_epoch`` and a user's own settings reach it. Copies and
    pickles of it are the inner sampler.

    Args:
        inner: The loader's own batch sampler.
        wanted: Whether a pass that begins now is worth recording.
    """

    def __init__(self, inner: Any, wanted: Callable[[], bool]) -> None:
        vars(self).update(inner=inner, passes=[], _wanted=wanted)

    def __iter__(self) -> Iterator[Any]:
        if not self._wanted():
            return iter(self.inner)
        draws = Draws(self.inner)
        self.passes.append(weakref.ref(draws))
        return draws

    def alive(self) -> list[Draws]:
        """Return the passes begun since the last call that somebody still holds, and forget all of them."""
        found = [draws for reference in self.passes if (draws := reference()) is not None]
        self.passes.clear()
        return found

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.inner,)


def _itself(value: Any) -> Any:
    return value


class SampleRecorder:
    """Follows the training loader of one run.

    Args:
        trainer: The Trainer whose strategy is given every loader it will use.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loader: DataLoader[Any] | None = None
        self._problem: str | None = "The training loader was not seen yet."
        self._recorder: RecordingBatchSampler | None = None
        self._draws: Draws | None = None
        self._epoch: int | None = None
        self._position = -1
        self._current: list[int] | None = None

    @property
    def size(self) -> int:
        """Number of samples in the training dataset.

        Raises:
            MisconfigurationException: The loader's samples cannot be counted.
        """
        self._refuse()
        assert self._loader is not None
        try:
            return len(self._loader.dataset)  # type: ignore[arg-type]
        except TypeError:
            name = type(self._loader.dataset).__name__
            raise MisconfigurationException(f"The training dataset {name} has no __len__; give it one. {FIX}") from None

    def install(self) -> Shim:
        """Watch ``strategy.process_dataloader``, which sees loaders after Lightning gave them a distributed sampler."""
        return Shim(self._trainer.strategy, "process_dataloader", self._process).install()

    def remove(self) -> None:
        """Give the loader back its own batch sampler."""
        if self._loader is not None and self._recorder is not None:
            vars(self._loader)["batch_sampler"] = self._recorder.inner
        self._loader = self._recorder = self._draws = self._current = None
        self._problem = "The training loader is no longer followed."

    def advance(self) -> None:
        """Note that the next training batch has arrived."""
        self._current = None
        if self._problem is not None or self._recorder is None:
            return
        epoch, position = self._trainer.current_epoch, self._trainer.fit_loop.batch_idx
        if self._draws is None or epoch != self._epoch:
            skipped = self._begin_epoch(epoch, position)
        else:
            # What begins in the middle of an epoch is somebody else's pass over the loader.
            self._recorder.alive()
            # Lightning counts a batch that collates to None but calls no hook for it.
            skipped = position - self._position - 1
        self._position = position
        pending = self._draws.pending if self._draws is not None else deque()
        for _ in range(skipped + 1):
            self._current = pending.popleft() if pending else None

    def indices(self) -> Tensor:
        """Return the dataset positions of the batch at hand, shape ``(batch,)``, int64.

        Raises:
            MisconfigurationException: The loader does not tell; the message says what to do.
        """
        self._refuse()
        if self._current is None:
            raise MisconfigurationException(
                "This batch did not come from the recorded training loader, or its batch sampler does not yield integer "
                f"positions. {FIX}"
            )
        return torch.tensor(self._current, dtype=torch.int64)

    def _refuse(self) -> None:
        if self._problem is not None:
            raise MisconfigurationException(f"{self._problem} {FIX}")

    def _begin_epoch(self, epoch: int, position: int) -> int:
        """Find the pass Lightning has begun for this epoch; return how many batches of it went by unseen."""
        assert self._recorder is not None
        resumed = position > 0 and self._trainer.fit_loop.is_resuming
        passes = [draws for draws in self._recorder.alive() if draws is not self._draws]
        self._draws, self._epoch = (passes[0] if passes else None), epoch
        loaders = CombinedLoader(self._trainer.train_dataloader).flattened
        if len(loaders) > 1:
            self._problem = f"There are {len(loaders)} training loaders, so a batch has no single dataset position."
        elif len(passes) > 1:
            self._problem = (
                "Something else (a callback?) holds an iterator over the training loader when an epoch begins, so it is not "
                "known which samples Lightning was given. Let that code use a loader of its own."
            )
        elif resumed and hasattr(self._loader, "load_state_dict"):
            self._problem = "The training loader restores its own position, so its sample order after a resume is not known."
        return 0 if resumed else position

    def _process(self, inner: Callable[[Any], Any], loader: Any) -> Any:
        loader = inner(loader)
        if not self._trainer.training:
            return loader
        self.remove()
        self._epoch = None
        self._problem = self._why_not(loader)
        if self._problem is None:
            self._loader = loader
            self._recorder = RecordingBatchSampler(loader.batch_sampler, lambda: bool(self._trainer.training))
            # DataLoader refuses the assignment once it is built, but reads the attribute for every new iterator. One that
            # persistent workers left behind holds the sampler it was built with.
            vars(loader)["batch_sampler"] = self._recorder
            loader._iterator = None
        return loader

    def _why_not(self, loader: Any) -> str | None:
        if not isinstance(loader, DataLoader):
            return f"The training loader is a {type(loader).__name__}, whose sample order is not known."
        if isinstance(loader.dataset, IterableDataset):
            return "The training dataset is iterable, so its samples have no index."
        if loader.batch_sampler is None:
            return "The training loader has batching switched off (batch_size=None), so its samples have no index."
        if not getattr(loader, "in_order", True):
            return "The training loader was built with in_order=False, so batches arrive in any order."
        step = self._trainer.lightning_module.training_step
        if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            return "training_step takes a dataloader_iter and fetches batches itself, so it is not known which it uses."
        return None

"""Which dataset samples a training batch is made of, without a change to the user's dataset or ``training_step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.capture.collate_order import reorders
from lightning_peft.capture.draws import Draws, RecordingBatchSampler, listen_to
from lightning_peft.capture.shim import Shim

FIX = 'Give the index in the batch instead: sample_index="<key or position>", for instance sample_index="index" or "2".'


class SampleRecorder:
    """Follows the training loader of one run.

    Args:
        trainer: The Trainer whose fit loop sets the loader up.

    Attributes:
        restores: Whether the loader goes on from the position that a checkpoint had for it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._shims: list[Shim] = []
        self._setting_up = self.restores = False
        self._loaders = 0
        self._forget("The training loader was not seen yet.")

    def _forget(self, problem: str | None) -> None:
        self._loader: DataLoader[Any] | None = None
        self._recorder: RecordingBatchSampler | None = None
        self._draws: Draws | None = None
        self._epoch: int | None = None
        self._current: list[int] | None = None
        self._problem = problem

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

    def install(self) -> None:
        """Watch the fit loop set its loader up, and follow the one it has if another callback has asked for it before.

        ``strategy.process_dataloader`` sees a loader when Lightning has given it a distributed sampler and not yet begun a
        pass over it, but sees those of validation too; which is the training loader only the fit loop knows.
        """
        loop = self._trainer.fit_loop
        self._shims = [
            Shim(loop, "setup_data", self._set_up).install(),
            Shim(self._trainer.strategy, "process_dataloader", self._process).install(),
        ]
        if loop._combined_loader is not None:
            for loader in loop._combined_loader.flattened:
                self._follow(loader)
            if loop._data_fetcher is not None:
                iter(loop._data_fetcher)

    def remove(self) -> None:
        """Give the loader back its own batch sampler."""
        for shim in reversed(self._shims):
            shim.remove()
        self._release("The training loader is no longer followed.")

    def _release(self, problem: str | None) -> None:
        if self._loader is not None and self._recorder is not None:
            vars(self._loader)["batch_sampler"] = self._recorder.inner
        self._forget(problem)

    def advance(self) -> None:
        """Note that the next training batch has arrived."""
        self._current = None
        if self._problem is not None or self._recorder is None:
            return
        epoch, place = self._trainer.current_epoch, self._trainer.fit_loop.batch_idx
        if self._draws is None or epoch != self._epoch:
            self._begin_epoch(epoch, place)
        else:
            # What begins in the middle of an epoch is somebody else's pass over the loader.
            self._recorder.alive()
        if self._draws is not None:
            # Lightning counts a batch that collates to None but calls no hook for it, so places may be left out.
            self._current = self._draws.arrive(place)

    @property
    def current(self) -> list[int] | None:
        """Positions of the batch at hand, ``None`` if they are not known; set it while an earlier batch is evaluated again."""
        return self._current

    @current.setter
    def current(self, positions: list[int] | None) -> None:
        self._current = positions

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
        return torch.from_numpy(np.array(self._current, dtype=np.int64))  # in a third of the time of a tensor of a list

    def check_order(self) -> None:
        """Look once at whether the loader collates the batch at hand in the order its samples were drawn in.

        Raises:
            MisconfigurationException: It sorts them.
        """
        if self._current is not None and isinstance(self._loader, DataLoader) and reorders(self._loader, self._current):
            name = getattr(self._loader.collate_fn, "__name__", type(self._loader.collate_fn).__name__)
            raise MisconfigurationException(
                f"The collate function of the training loader ({name}) reorders the samples of a batch, so which row "
                f"is which is not known. {FIX}"
            )

    def _refuse(self) -> None:
        if self._problem is not None:
            raise MisconfigurationException(f"{self._problem} {FIX}")

    def _begin_epoch(self, epoch: int, place: int) -> None:
        """Find the pass Lightning has begun for this epoch, and which of its batches is the first."""
        assert self._recorder is not None
        passes = self._recorder.alive()
        self._draws, self._epoch = (passes[0] if passes else None), epoch
        if len(passes) > 1:
            self._problem = (
                "Something else (a callback?) holds an iterator over the training loader when an epoch begins, so it is not "
                "known which samples Lightning was given. Let that code use a loader of its own."
            )
        elif self._draws is not None and place > 0 and self._trainer.fit_loop.is_resuming:
            self._draws.first = self._first_after_resume(self._draws, place)

    def _first_after_resume(self, draws: Draws, place: int) -> int:
        """Place in the epoch of the first batch that a pass has drawn since a run was resumed in its middle."""
        if not self.restores:
            return place  # Lightning begins such a loader anew and takes as many batches as were left
        counted = getattr(getattr(self._loader, "_iterator", None), "_sampler_iter_yielded", None)
        if counted is None:
            self._problem = (
                f"The training loader is a {type(self._loader).__name__}, which restores its own position, so its sample order "
                "after a resume is not known."
            )
            return place
        # torchdata counts the draws of the epoch, those before the checkpoint too unless it makes them anew.
        return int(counted) - draws.drawn

    def _set_up(self, inner: Callable[[], Any]) -> None:
        loop = self._trainer.fit_loop
        if loop._combined_loader is not None and not loop._should_reload_train_dl:
            return
        self._release("The training loader was not seen yet.")
        self._loaders = 0
        self.restores = bool(loop.restarting and loop._combined_loader_states_to_load)
        with self._listening():
            inner()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        self._setting_up = True
        try:
            yield
        finally:
            self._setting_up = False

    def _process(self, inner: Callable[[Any], Any], loader: Any) -> Any:
        loader = inner(loader)
        if self._setting_up:
            self._follow(loader)
        return loader

    def _follow(self, loader: Any) -> None:
        self._loaders += 1
        if self._loaders > 1:
            self._release(f"There are {self._loaders} training loaders, so a batch has no single dataset position.")
            return
        self._loader, self._problem = loader, self._why_not(loader)
        if self._problem is None:
            self._recorder = listen_to(loader.batch_sampler, lambda: self._setting_up or bool(self._trainer.training))
            # DataLoader refuses the assignment once it is built, but reads the attribute for every new iterator. One that
            # persistent workers or a look at its state left behind holds the sampler it was built with.
            vars(loader)["batch_sampler"] = self._recorder
            loader._iterator = None
            if getattr(loader, "_initial_iter_for_state_dict", False):
                loader._initial_iter_for_state_dict = False

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

"""A batch sampler that is listened to: what a loader draws, in the order in which it will deliver."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Draws:
    """One pass over a batch sampler; ``pending`` holds what was drawn and has not arrived yet, ``None`` where no positions.

    A ``DataLoader`` returns batches in the order its batch sampler yields them, whatever its workers and prefetching do, so the
    k-th batch that arrives is the k-th one drawn in the same pass.

    Attributes:
        pending: Positions by batch, in the order of the draws.
        drawn: Batches drawn in all.
        first: Place in its epoch of the first pending batch.
    """

    def __init__(self, inner: Iterator[Any]) -> None:
        self.pending: deque[list[int] | None] = deque()
        self.drawn = self.first = 0
        self._inner = inner

    def arrive(self, place: int) -> list[int] | None:
        """Let go of all batches up to one that has arrived, and return its positions; ``None`` when they are not known."""
        found = None
        while self.first <= place:
            found = self.pending.popleft() if self.pending else None
            self.first += 1
        return found

    def __iter__(self) -> Draws:
        return self

    def __next__(self) -> Any:
        batch = next(self._inner)
        self.drawn += 1
        try:
            self.pending.append([int(index) for index in batch])
        except (TypeError, ValueError):
            self.pending.append(None)
        return batch


class ResumableDraws(Draws):
    """A pass over a batch sampler whose iterator can be saved, as those of ``torchdata`` can."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the iterator itself, so that the checkpoint is that of a loader nobody records."""
        return self._inner.state_dict()  # type: ignore[attr-defined, no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self._inner.load_state_dict(state)  # type: ignore[attr-defined]


def record(batch_sampler: Iterable[Any]) -> Draws:
    """Begin a pass that is recorded, and that looks as resumable to its loader as the one it stands for."""
    inner = iter(batch_sampler)
    return (ResumableDraws if _is_resumable(inner) else Draws)(inner)


def _is_resumable(value: object) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


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
        draws = record(self.inner)
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


class ResumableBatchSampler(RecordingBatchSampler):
    """Stands in for a batch sampler that can be saved; loaders look for the two methods on the class."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the batch sampler itself."""
        return self.inner.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.inner.load_state_dict(state)


def listen_to(batch_sampler: Any, wanted: Callable[[], bool]) -> RecordingBatchSampler:
    """Return the stand-in for a batch sampler, one as resumable as it is; see :class:`RecordingBatchSampler`."""
    return (ResumableBatchSampler if _is_resumable(batch_sampler) else RecordingBatchSampler)(batch_sampler, wanted)


def _itself(value: Any) -> Any:
    return value

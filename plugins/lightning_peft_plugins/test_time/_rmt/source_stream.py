"""Labelled batches of the source, again and again, as the user's own step hands them to the network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.labels import labels_of
from lightning_peft_plugins.test_time._shared.source_calls import source_calls


class SourceStream:
    """Calls of the network with batches of the source, and their labels.

    Args:
        method: Name of the method, for messages.
        run: The run, with its network.
        batches: A loader whose batches the module's step takes.
    """

    def __init__(self, method: str, run: Run, batches: Iterable[Any]) -> None:
        self._method, self._run, self._batches = method, run, batches
        self._endless: Iterator[tuple[Call, Tensor]] | None = None
        self._drawn = self._mark = 0

    def once(self, first: int = 0) -> Iterator[tuple[Call, Tensor]]:
        """All batches from one on, once.

        Args:
            first: Place of the batch to begin with.

        Raises:
            MisconfigurationException: The labels of a batch cannot be told, or are not one a sample.
        """
        last: list[Any] = []

        def remembered() -> Iterator[Any]:
            for batch in itertools.islice(self._batches, first, None):
                last[:] = [batch]
                yield batch

        for call in source_calls(self._run, remembered()):
            labels = labels_of(last[0])
            if labels is None or len(labels) != call.size:
                raise MisconfigurationException(
                    f"{self._method} needs the labels of its source, one a sample, and cannot tell them from a batch of "
                    f"{type(last[0]).__name__}. Make batches (inputs, labels), or mappings with a key 'labels'; without labels "
                    "give prototypes=<classes x width> and no source."
                )
            yield call, labels.to(self._run.module.device)

    def next(self) -> tuple[Call, Tensor]:
        """The next batch; the first comes again after the last.

        Raises:
            MisconfigurationException: There is none.
        """
        for _ in range(2):
            if self._endless is None:
                self._endless = self.once(self._drawn)
            found = next(self._endless, None)
            if found is not None:
                self._drawn += 1
                return found
            self._endless, self._drawn = None, 0
        raise MisconfigurationException(f"{self._method}: source= has no batch. Give a loader that can be iterated anew.")

    def mark(self) -> None:
        """Remember which batch comes next."""
        self._mark = self._drawn

    def to_mark(self) -> None:
        """Go on with the batch that was to come at the mark."""
        self._endless, self._drawn = None, self._mark

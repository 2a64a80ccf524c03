"""Ways through a batch: all predictions, and walks back from those that count, in several orders of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, TypeAlias

from lightning_peft.capture.evaluation import Call
from lightning_peft.network.batches import join
from lightning_peft_plugins.test_time._shared.costs import Way
from lightning_peft_plugins.test_time._shared.walks import Walk, Walker
from lightning_peft_plugins.test_time._shared.workers import Workers, fits

Keep: TypeAlias = "Callable[[Walk | None], None]"


class Ways:
    """Takes a batch one way or another, to the same end.

    Args:
        walker: Runs the network and walks back.
    """

    def __init__(self, walker: Walker) -> None:
        self._walker = walker
        self._workers: Workers | None = None
        self._by_name = {
            "whole": self._whole,
            "chunks": self._chunks,
            "workers": self._side_by_side,
            "second-pass": self._second_pass,
        }

    def take(self, way: Way, call: Call, keep: Keep) -> Any:
        """Run a call, hand every walk to ``keep``, in an order that does not depend on time, and return the output."""
        return self._by_name[way.name](call, way.chunk_size, keep)

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _whole(self, call: Call, chunk_size: int, keep: Keep) -> Any:
        output, walk = self._walker.there_and_back(call)
        keep(walk)
        return output

    def _chunks(self, call: Call, chunk_size: int, keep: Keep) -> Any:
        calls = _split(call, chunk_size)
        return _collect(map(self._walker.there_and_back, calls), calls, keep)

    def _side_by_side(self, call: Call, chunk_size: int, keep: Keep) -> Any:
        if not fits(call):  # hooks come and go
            return self._chunks(call, chunk_size, keep)
        calls = _split(call, chunk_size)
        with closing(self._threads().run(self._walker.there_and_back, calls)) as parts:
            return _collect(parts, calls, keep)

    def _second_pass(self, call: Call, chunk_size: int, keep: Keep) -> Any:
        output = call()
        keep(self._walker.again(call, self._walker.weigh(call, self._walker.predict(output))))
        return output

    def _threads(self) -> Workers:
        if self._workers is None:
            self._workers = Workers()
        return self._workers


def _collect(parts: Iterable[tuple[Any, Walk | None]], calls: list[Call], keep: Keep) -> Any:
    outputs = []
    for output, walk in parts:
        outputs.append(output)
        keep(walk)
    return join(outputs, [call.size for call in calls])


def _split(call: Call, chunk_size: int) -> list[Call]:
    return [call.take(slice(start, start + chunk_size)) for start in range(0, call.size, chunk_size)]

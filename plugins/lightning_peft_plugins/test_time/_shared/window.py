"""The last samples of a stream that comes one by one, so that there is a batch to adapt to."""

from __future__ import annotations

from lightning_peft.capture.evaluation import Call
from lightning_peft.network.batches import tensors_of


class Window:
    """Keeps the last samples; inputs of another shape start a new window.

    Args:
        length: Number of samples.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self._past: Call | None = None
        self._fresh = 0

    def take_turn(self) -> bool:
        """Whether all samples are new since this was last the case; the count begins anew then."""
        if self._fresh < self.length:
            return False
        self._fresh = 0
        return True

    def extend(self, call: Call) -> Call:
        """Take in the samples of a call; return the last ones, the call's at their end."""
        if self._past is not None and _shapes(self._past) != _shapes(call):
            self.clear()
        crowd = call if self._past is None else Call.gather([self._past, call])
        if crowd.size > self.length and call.size < crowd.size:
            crowd = crowd.take(slice(crowd.size - max(self.length, call.size), None))
        self._past = crowd
        self._fresh += call.size
        return crowd


def _shapes(call: Call) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[1:]) for tensor in tensors_of((call.args, call.kwargs))]

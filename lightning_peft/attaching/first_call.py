"""The first call of the network in the user's own step, by shape and range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_peft.capture.shim import Shim
from lightning_peft.capture.tap import forward_attribute, step_compiler
from lightning_peft.compose.run import Run
from lightning_peft.structure.coupled.example import record


class FirstCall:
    """Waits for a call of the network, and records it.

    Args:
        counts: Whether a call that is made now counts.

    Attributes:
        example: The record (:func:`~lightning_peft.structure.coupled.example.record`), ``None`` before there was a call.
    """

    def __init__(self, counts: Callable[[], bool]) -> None:
        self.example: dict[str, Any] | None = None
        self._counts = counts
        self._shim: Shim | None = None

    def wait(self, run: Run) -> None:
        """Record the next call, unless there is a record."""
        if self.example is None:
            name, compiler = forward_attribute(run.network), step_compiler(run.module)
            self._shim = Shim(run.network, name, self._see, traced=False, compiler=compiler).install()

    def _see(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if self.example is None and self._counts():
            self.example = record(args, kwargs)
        return inner(*args, **kwargs)

    def settle(self) -> None:
        """Stop waiting once there is a record."""
        if self.example is not None:
            self.stop()

    def stop(self) -> None:
        """Stop waiting."""
        if self._shim is not None:
            self._shim.remove()
            self._shim = None

"""The computation of one optimizer step's gradients, as a method sees it that wants them otherwise, or once more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor


class StepClosure:
    """Computes the gradients of an optimizer step when it is called, and once more when it is asked.

    Args:
        first: The step's own forward and backward passes, those that the user logs.
        again: The same once more, silently; its argument says whether statistics are updated.
        scale: See the property.

    Attributes:
        loss: What the call returned; ``None`` before it.
    """

    def __init__(self, first: Callable[[], Any], again: Callable[[bool], Any], scale: Callable[[], float]) -> None:
        self.loss: Any = None
        self._first, self._again, self._scale = first, again, scale

    def __call__(self) -> Any:
        """Compute loss and gradients at the present weights.

        Returns:
            The loss of the last batch, with all terms; by hand, what the user's closure returned.
        """
        self.loss = self._first()
        return self.loss

    def again(self, *, statistics: bool = False) -> Tensor | None:
        """Compute the gradients of the whole step anew, at the present weights, in place of those there are.

        All batches of an accumulation window are evaluated, with the terms of all methods and the same random numbers
        (dropout drops the same). Nothing is logged, metrics count nothing, methods remember nothing. What ``training_step``
        itself writes on the module or into its batch is beyond the engine.

        Args:
            statistics: Let buffers, such as the running statistics of batch norm, be updated a second time.

        Returns:
            The loss of the step, a scalar: the mean over its batches, with all terms; by hand, what the user's closure
            returned.

        Raises:
            MisconfigurationException: The module optimizes by hand, and gave ``optimizer.step()`` no closure, or one that
                adds to gradients of before.
            NonFiniteLossError: The loss is NaN or infinite at these weights.
        """
        loss: Tensor | None = self._again(statistics)
        return loss

    @property
    def scale(self) -> float:
        """Factor of a gradient scaler, by which all gradients are multiplied until the step; 1 without one."""
        return self._scale()

    def within(self, compute: Callable[[StepClosure], None]) -> StepClosure:
        """Return the closure whose gradients are those that ``compute`` makes of this one's."""

        def first() -> Any:
            compute(self)
            return self.loss

        def again(statistics: bool) -> Any:
            repeated = StepClosure(partial(self._again, statistics), self._again, self._scale)
            compute(repeated)
            return repeated.loss

        return StepClosure(first, again, self._scale)

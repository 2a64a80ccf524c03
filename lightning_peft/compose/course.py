"""The length of a training in optimizer steps: arithmetic on what the Trainer was told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.compose.schedule import Point, unplaced


@dataclass(frozen=True)
class Course:
    """The limits of one training; ``None`` stands for one that is not set or not known.

    Attributes:
        batches: Batches of an epoch; ``None`` for a stream without a length.
        max_epochs: Epochs after which the training ends.
        max_steps: Optimizer steps after which it ends.
        accumulation: Batches that make one optimizer step, by the first epoch in which they do. An epoch's last batch always
            makes a step.

    Example:
        >>> course = Course(batches=10, max_epochs=4, accumulation={0: 1, 2: 4})
        >>> course.steps_before(2), course.total, course.epochs_after(23)
        (20, 26, 3.0)
    """

    batches: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    accumulation: Mapping[int, int] = field(default_factory=lambda: {0: 1})

    @property
    def total(self) -> int | None:
        """Optimizer steps in all; ``None`` when there is no end, or none that can be known."""
        by_epochs = None if self.max_epochs is None or self.batches is None else self.steps_before(self.max_epochs)
        known = [steps for steps in (by_epochs, self.max_steps) if steps is not None]
        return max(1, min(known)) if known else None

    def steps_before(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, rounded to the nearest; ``batches`` must be known."""
        steps = 0.0
        for first, last, length in self._spans():
            if epochs > first:
                steps += (min(epochs, last) - first) * length
        return round(steps)

    def epochs_after(self, steps: int) -> float:
        """Epochs that so many optimizer steps take, the inverse of :meth:`steps_before`; ``batches`` must be known."""
        epochs = 0.0
        for first, last, length in self._spans():
            epochs += min(last - first, steps / length)
            steps -= int(min(last - first, steps / length) * length)
        return epochs

    def _spans(self) -> Iterator[tuple[float, float, int]]:
        """Yield stretches of equal epochs: the first, the one after the last, and the optimizer steps of each epoch."""
        assert self.batches is not None
        starts = sorted(self.accumulation)
        for first, last in zip(starts, [*starts[1:], math.inf], strict=True):
            yield first, last, max(1, math.ceil(self.batches / self.accumulation[first]))

    def place(self, point: Point, argument: str = "A schedule point") -> int:
        """Convert a point of training to optimizer steps.

        Args:
            point: The point.
            argument: Where it was given, for the message.

        Raises:
            MisconfigurationException: The length that the point is a part of is not known; the message says how to give it.
        """
        if point.unit == "step":
            return round(point.amount)
        if point.unit == "fraction":
            if self.total is None:
                raise unplaced(point, argument, self.cure)
            return round(point.amount * self.total)
        if self.batches is None:
            raise unplaced(point, argument, "Trainer(limit_train_batches=...), the number of batches you call an epoch")
        return self.steps_before(point.amount)

    def place_from_end(self, point: Point, argument: str = "A schedule point") -> int:
        """Convert a length before the end of training to the optimizer steps that come before it; negative if it does not fit.

        Raises:
            MisconfigurationException: As for :meth:`place`, or the end is not known.
        """
        total = self.require_total()
        if point.unit != "epoch":
            return total - self.place(point, argument)
        self.place(point, argument)
        begins = self.epochs_after(total) - point.amount
        return self.steps_before(begins) if begins >= 0 else -1

    @property
    def cure(self) -> str:
        """The arguments of the Trainer that would give this training an end."""
        if self.batches is not None:
            return "Trainer(max_epochs=...) or Trainer(max_steps=...)"
        return "Trainer(max_steps=...), since the loader has no length"

    def require_total(self) -> int:
        """Return :attr:`total`.

        Raises:
            MisconfigurationException: It is not known.
        """
        if self.total is None:
            raise MisconfigurationException(f"The length of the training is not known beforehand. Give {self.cure}.")
        return self.total

    def require_epochs(self) -> int:
        """Return how many epochs the training has, the last one perhaps in part.

        Raises:
            MisconfigurationException: It is not known.
        """
        if self.max_steps is not None and self.batches is not None:
            epochs = max(1, math.ceil(self.epochs_after(self.max_steps)))
            return epochs if self.max_epochs is None else min(epochs, self.max_epochs)
        if self.max_epochs is None:
            raise MisconfigurationException("The training has no number of epochs. Give Trainer(max_epochs=...).")
        return self.max_epochs

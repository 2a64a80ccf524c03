"""Values that change over training: one schedule type on one clock.

The clock is the number of optimizer steps taken by the first optimizer. A point on it is written as

* an ``int``, or a whole ``float`` above 1: that many optimizer steps (``1000``, ``1e3``, ``"step:1000"``);
* a ``float`` from 0 to 1: a fraction of all optimizer steps (``0.3``). Note that ``1`` is one step and ``1.0`` the end;
* ``"30%"``: the same fraction, spelled out;
* ``"3ep"`` or ``"epoch:3"``: epochs, fractions of an epoch allowed (``"2.5ep"``).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shape = Literal["constant", "linear", "cosine", "cubic", "exponential", "step"]
_SHAPES = ("constant", "linear", "cosine", "cubic", "exponential", "step")


@dataclass(frozen=True)
class Point:
    """A moment of training, not yet tied to a run.

    Attributes:
        amount: How many of ``unit``.
        unit: Optimizer steps, fraction of all optimizer steps (0 to 1), or epochs.
    """

    amount: float
    unit: Literal["step", "fraction", "epoch"]

    def resolve(self, total_steps: float | None, steps_per_epoch: float | None) -> int:
        """Convert to optimizer steps, rounded to the nearest.

        Args:
            total_steps: Optimizer steps of the whole run; ``None`` or infinite when unknown.
            steps_per_epoch: Optimizer steps of one epoch; ``None`` or infinite when unknown.

        Returns:
            Number of optimizer steps.

        Raises:
            MisconfigurationException: If the point is a fraction or in epochs and that length is unknown.

        Example:
            >>> parse_point("30%").resolve(total_steps=1000, steps_per_epoch=None)
            300
        """
        if self.unit == "step":
            return round(self.amount)
        length = total_steps if self.unit == "fraction" else steps_per_epoch
        if length is None or not 0 < length < math.inf:
            setting = "max_steps" if self.unit == "fraction" else "limit_train_batches"
            raise unplaced(self, "A schedule point", f"Trainer({setting}=...) or a loader with a length")
        return round(self.amount * length)


def unplaced(point: Point, argument: str, cure: str) -> MisconfigurationException:
    """Make the error for a point that is a part of a length nobody knows.

    Args:
        point: A fraction, or epochs.
        argument: Where it was given.
        cure: Settings that would make the length known.
    """
    place, length = {
        "fraction": (f"{100 * point.amount:.6g} % of training", "training"),
        "epoch": (f"{point.amount:.6g} epochs", "an epoch"),
    }[point.unit]
    return MisconfigurationException(
        f"{argument} at {place} cannot be placed: the length of {length} is unknown. Give {cure}, or write the point as a "
        "number of optimizer steps."
    )


def parse_point(spec: float | str) -> Point:
    """Read a point on the clock, see the module docstring.

    Raises:
        MisconfigurationException: If the point is negative, beyond 100 % or not understood.

    Example:
        >>> parse_point("30%"), parse_point(500), parse_point("3ep")
        (Point(amount=0.3, unit='fraction'), Point(amount=500, unit='step'), Point(amount=3.0, unit='epoch'))
    """
    if isinstance(spec, str):
        return _parse_text(spec)
    if not isinstance(spec, bool) and isinstance(spec, (int, float)) and 0 <= spec < math.inf:
        if isinstance(spec, int) or (spec > 1 and spec == int(spec)):
            return Point(int(spec), "step")
        if spec <= 1:
            return Point(spec, "fraction")
    raise _bad_point(spec)


def _parse_text(spec: str) -> Point:
    number = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)"
    text = spec.strip().lower()
    if match := re.fullmatch(rf"{number}\s*%", text):
        if float(match[1]) <= 100:
            return Point(float(match[1]) / 100, "fraction")
    elif match := re.fullmatch(rf"{number}\s*ep|epoch:\s*{number}", text):
        return Point(float(match[1] or match[2]), "epoch")
    elif match := re.fullmatch(rf"step:\s*{number}", text):
        return Point(round(float(match[1])), "step")
    elif match := re.fullmatch(number, text):
        return parse_point(int(text) if text.isdigit() else float(text))
    raise _bad_point(spec)


def _bad_point(spec: object) -> MisconfigurationException:
    return MisconfigurationException(
        f'{spec!r} is not a point of training. Write optimizer steps (500), a share of training ("30%" or 0.3) '
        'or epochs ("3ep").'
    )


@dataclass(frozen=True)
class Schedule:
    """A value that goes from one level to another between two points of training.

    Before ``start`` the value is the first of ``values``, from ``end`` on it is exactly the last. In between, with
    ``p`` running from 0 to 1 and levels ``a`` and ``b``:

    * ``linear``: ``a + (b - a) p``
    * ``cosine``: ``b + (a - b) (1 + cos(pi p)) / 2``
    * ``cubic``: ``b + (a - b) (1 - p)^3``, the gradual pruning of Zhu & Gupta (2017, arXiv:1710.01878, equation 1)
    * ``exponential``: ``a (b / a)^p``, equal factors in equal times
    * ``step``: any number of levels, each held for an equal share of the time
    * ``constant``: switches to ``b`` at ``start``

    Attributes:
        start: Where the change begins: optimizer steps, fraction, ``"30%"`` or ``"3ep"``.
        end: Where the last value is reached, written likewise.
        shape: How it gets there.
        values: Two levels, for ``step`` two or more.

    Raises:
        MisconfigurationException: If a point or shape is not understood, or the levels do not fit the shape.

    Example:
        >>> sparsity = Schedule("10%", "50%", shape="cubic", values=(0.0, 0.5)).resolve(total_steps=100)
        >>> [round(sparsity.value(step), 4) for step in (0, 10, 30, 50, 99)]
        [0.0, 0.0, 0.4375, 0.5, 0.5]
    """

    start: int | float | str = 0
    end: int | float | str = "100%"
    shape: Shape = "linear"
    values: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        parse_point(self.start)
        parse_point(self.end)
        _check_levels(self.shape, self.values)

    def resolve(self, total_steps: float | None, steps_per_epoch: float | None = None) -> ResolvedSchedule:
        """Tie the schedule to the length of a run.

        Args:
            total_steps: Optimizer steps of the whole run (``trainer.estimated_stepping_batches``); ``None`` or
                infinite when unknown.
            steps_per_epoch: Optimizer steps of one epoch; needed for points in epochs only.

        Raises:
            MisconfigurationException: If a needed length is unknown, or the schedule ends before it starts.
        """
        return self.between(*(parse_point(point).resolve(total_steps, steps_per_epoch) for point in (self.start, self.end)))

    def between(self, start: int, end: int) -> ResolvedSchedule:
        """Tie the schedule to two optimizer steps.

        Raises:
            MisconfigurationException: It ends before it starts.
        """
        if end < start:
            raise MisconfigurationException(
                f"The schedule ends (end={self.end!r}, step {end}) before it starts (start={self.start!r}, step "
                f"{start}). Move `end` to step {start} or later."
            )
        return ResolvedSchedule(start, end, self.shape, self.values)

    def plot(self, ax: Axes | None = None, total_steps: int = 1000, steps_per_epoch: int = 100) -> Axes:
        """Draw the schedule for a run of that length, see :meth:`ResolvedSchedule.plot`."""
        return self.resolve(total_steps, steps_per_epoch).plot(ax)


@dataclass(frozen=True)
class ResolvedSchedule:
    """A :class:`Schedule` in optimizer steps.

    Attributes:
        start: Step up to which the first value holds.
        end: Step from which the last value holds.
        shape: As in :class:`Schedule`.
        values: As in :class:`Schedule`.
    """

    start: int
    end: int
    shape: Shape
    values: tuple[float, ...]

    def value(self, step: float) -> float:
        """Value after ``step`` optimizer steps; a pure function, monotone between two levels.

        Example:
            >>> Schedule(0, 10, shape="step", values=(4, 3, 2)).resolve(10).value(5)
            3.0
        """
        first, last = self.values[0], self.values[-1]
        if step >= self.end or (self.shape == "constant" and step >= self.start):
            return last
        if step <= self.start or self.shape == "constant":
            return first
        progress = (step - self.start) / (self.end - self.start)
        if self.shape == "step":
            return self.values[int(progress * len(self.values))]
        value = _interpolate(self.shape, first, last, progress)
        return min(max(value, min(first, last)), max(first, last))  # rounding must not overshoot an end

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw value against optimizer step, with a margin on both sides.

        Args:
            ax: Matplotlib axes to draw on; by default those of a new figure.

        Raises:
            MisconfigurationException: If matplotlib is not installed (the ``report`` extra).
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise MisconfigurationException(
                    'Plotting a schedule needs matplotlib: pip install "lightning-peft[report]".'
                ) from error
            ax = plt.subplots()[1]
        margin = max(1, (self.end - self.start) // 10)
        low, high = max(0, self.start - margin), self.end + margin
        steps = [low + (high - low) * i / 400 for i in range(401)]
        ax.plot(steps, [self.value(step) for step in steps])
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("value")
        return ax


def _check_levels(shape: str, levels: tuple[float, ...]) -> None:
    if shape not in _SHAPES:
        raise MisconfigurationException(f"Unknown schedule shape {shape!r}; one of {', '.join(_SHAPES)}.")
    if len(levels) < 2 or (shape != "step" and len(levels) > 2):
        expected = "two or more" if shape == "step" else "exactly two"
        raise MisconfigurationException(f"shape={shape!r} takes {expected} values, got {levels}.")
    if not all(map(math.isfinite, levels)):
        raise MisconfigurationException(f"Schedule values must be finite, got {levels}.")
    if shape == "exponential" and levels[0] * levels[1] <= 0:
        raise MisconfigurationException(
            f"shape='exponential' multiplies its way from one value to the other, so both need the same sign and "
            f"neither may be 0, got {levels}. Use a small number instead of 0, or shape='cubic'."
        )


def _interpolate(shape: str, first: float, last: float, progress: float) -> float:
    if shape == "exponential":
        return float(first * (last / first) ** progress)
    rest = 1.0 - progress
    remaining = {"linear": rest, "cosine": (1.0 + math.cos(math.pi * progress)) / 2, "cubic": rest * rest * rest}
    return last + (first - last) * remaining[shape]

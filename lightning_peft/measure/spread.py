"""Mean and spread of a number over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Mean and spread of one number over seeds.

    Attributes:
        mean: Mean.
        std: Standard deviation of the sample; ``None`` for one seed, which tells nothing of it.
        low: Lowest.
        high: Highest.
    """

    mean: float
    std: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values.

        Example:
            >>> Spread.of([1.0, 3.0])
            Spread(mean=2.0, std=1.414..., low=1.0, high=3.0)
        """
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, min(values), max(values))

    def text(self, digits: int, *, unit: float = 1, sign: str = "") -> str:
        """Write mean and standard deviation for people.

        Args:
            digits: Digits after the point.
            unit: What one is shown as, 100 for percent.
            sign: ``"+"`` to show the sign of positive means too.

        Example:
            >>> Spread.of([0.25, 0.75]).text(1, unit=100), Spread.of([0.25]).text(1, unit=100, sign="+")
            ('50.0 ± 35.4', '+25.0')
        """
        mean = f"{unit * self.mean:{sign}.{digits}f}"
        return mean if self.std is None else f"{mean} ± {unit * self.std:.{digits}f}"

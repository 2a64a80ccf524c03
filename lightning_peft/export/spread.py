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
        std: Standard deviation of the sample; 0 for one seed.
        low: Lowest.
        high: Highest.
    """

    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values.

        Example:
            >>> Spread.of([1.0, 3.0])
            Spread(mean=2.0, std=1.414..., low=1.0, high=3.0)
        """
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, min(values), max(values))

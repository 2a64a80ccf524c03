"""Two things timed in turns, so that what else the machine does hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Paired:
    """Medians of two times, and the spread of their ratio.

    Attributes:
        first: Median seconds of the first.
        second: Median seconds of the second.
        ratio: Median of first over second, pair by pair.
        low: First quartile of that ratio.
        high: Third quartile.
    """

    first: float
    second: float
    ratio: float
    low: float
    high: float


def paired_times(
    first: Callable[[int], object], second: Callable[[int], object], *, pairs: int = 20, warm_up: int = 3
) -> Paired:
    """Time two functions of a counter in turns.

    Args:
        first: Called with 0, 1, 2, ...
        second: Called with the same numbers.
        pairs: Number of pairs; at least 2.
        warm_up: Pairs that are not counted.
    """
    times = [(_seconds(first, i), _seconds(second, i)) for i in range(warm_up + pairs)]
    ones, twos = zip(*times[warm_up:], strict=True)
    low, ratio, high = statistics.quantiles([one / two for one, two in times[warm_up:]], n=4)
    return Paired(statistics.median(ones), statistics.median(twos), ratio, low, high)


def _seconds(function: Callable[[int], object], i: int) -> float:
    _wait()
    start = time.perf_counter()
    function(i)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Two networks timed in turns, sample by sample."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_peft.measure.clock import time_calls, waiter


@dataclass(frozen=True)
class Paired:
    """Medians of two durations, and the spread of their ratio.

    Attributes:
        first: Median seconds of the first.
        second: Median seconds of the second.
        ratio: Median of first over second, call by call on the same input.
        low: First quartile of that ratio.
        high: Third quartile.
    """

    first: float
    second: float
    ratio: float
    low: float
    high: float


def paired_times(first: nn.Module, second: nn.Module, samples: Sequence[Tensor], *, runs: int = 24, warm_up: int = 3) -> Paired:
    """Time two networks on the same inputs in turns, so that what else the machine does meets both alike."""
    networks = {"first": first, "second": second}
    seconds = time_calls(networks, samples, runs=runs, warm_up=warm_up, wait=waiter(samples[0].device))
    ratios = [one / two for one, two in zip(seconds["first"], seconds["second"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Paired(statistics.median(seconds["first"]), statistics.median(seconds["second"]), ratio, low, high)

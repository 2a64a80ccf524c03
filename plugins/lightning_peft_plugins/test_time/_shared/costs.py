"""Which of several equivalent ways through a batch is the quickest, learnt from the first batches."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

NEARLY = 1.15  # of the best time: about what a timing is off by
TRIALS = 2  # the first batch of a process is slow whatever it does, so each way is timed twice and its better time counts


@dataclass(frozen=True)
class Way:
    """A way through a batch.

    Attributes:
        name: ``"whole"``, ``"chunks"`` one after the other, ``"workers"``: chunks side by side, or ``"second-pass"``.
        chunk_size: Samples in a part of the batch; 0 for ways that take it whole.

    Example:
        >>> print(Way("whole"), "|", Way("workers", 2))
        whole | workers, parts of 2
    """

    name: str
    chunk_size: int = 0

    def __str__(self) -> str:
        return f"{self.name}, parts of {self.chunk_size}" if self.chunk_size else self.name

    def passes(self, share: float) -> float:
        """Passes over a sample, forward and backward, on average, when a share of the samples is chosen.

        Example:
            >>> [way.passes(0.25) for way in (Way("whole"), Way("chunks", 1), Way("second-pass"))]
            [2.0, 1.25, 1.5]
        """
        if self.name == "second-pass":
            return 1.0 + 2.0 * share
        return 2.0 - (1.0 - share) ** self.chunk_size if self.chunk_size else 2.0


def candidates(size: int, chunk_size: int | None, threads: int) -> list[Way]:
    """Ways worth timing for batches of ``size`` samples.

    Args:
        size: Samples in a batch.
        chunk_size: Samples in a chunk; ``None`` tries several.
        threads: Threads whose every one may take a chunk; 1 for none.

    Example:
        >>> print(*candidates(16, None, 2), sep="; ")
        whole; workers, parts of 1; workers, parts of 2; workers, parts of 8; second-pass
        >>> print(*candidates(16, 4, 1), sep="; ")
        whole; chunks, parts of 4; second-pass
    """
    workers = threads > 1
    sizes = [1, 2, *([-(-size // threads)] if workers else [])] if chunk_size is None else [chunk_size]
    parts = [Way("workers" if workers else "chunks", n) for n in dict.fromkeys(sizes)]
    return [Way("whole"), *parts, Way("second-pass")]


@dataclass
class Timing:
    """One batch: its way, its samples, and how many of them were chosen."""

    way: Way
    samples: int
    chosen: int = 0


@dataclass
class Costs:
    """Seconds a sample of each way, and the share of samples chosen of late.

    A batch costs forward passes for all its samples and backward passes for some. With the time of a forward pass as unit and
    the backward pass as long (only norm parameters get gradients), a batch with a share ``f`` chosen costs ``2`` (whole),
    ``1 + hit(f)`` (chunks, ``hit`` the share of chunks with a chosen sample) and ``1 + 2 f`` (second pass). A measured time is
    divided by this to give the unit of its way, which holds what the formula does not know: how well small batches run here.

    Attributes:
        ways: Those that can be taken.
        units: Best unit seen of each way, in seconds a sample.
        trials: How often each way was taken.
        share: Moving average of the share chosen.
    """

    ways: list[Way]
    units: dict[Way, float] = field(default_factory=dict)
    trials: Counter[Way] = field(default_factory=Counter)
    share: float = 0.5

    @contextmanager
    def timed(self, way: Way, samples: int) -> Iterator[Timing]:
        """Time a batch."""
        timing = Timing(way, samples)
        start = time.perf_counter()
        yield timing
        seconds = time.perf_counter() - start
        share = timing.chosen / samples
        unit = seconds / samples / way.passes(share)
        self.trials[way] += 1
        self.units[way] = min(unit, self.units.get(way, unit))
        self.share += 0.3 * (share - self.share)

    def cheapest(self) -> Way:
        """The way that should be quickest for the share chosen of late; those hardly tried come first.

        Ways that seem nearly as quick get a turn now and then, ever more rarely, since two timings may have been unlucky.
        """
        for trial in range(TRIALS):
            for way in self.ways:
                if self.trials[way] <= trial:
                    return way
        times = {way: self.units[way] * way.passes(self.share) for way in self.ways}
        best = min(times, key=lambda way: times[way])
        rivals = [way for way in self.ways if times[way] <= NEARLY * times[best]]
        rarest = min(rivals, key=lambda way: self.trials[way])
        return rarest if self.trials[rarest] < math.log2(self.trials.total()) else best

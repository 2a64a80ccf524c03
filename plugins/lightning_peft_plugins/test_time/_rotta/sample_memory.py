"""RoTTA's memory: few samples of a long stream, balanced over predicted classes, fresh, and sure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class StoredSample:
    """A sample in memory, how unsure its prediction was (entropy, in nats), and how many samples ago it came."""

    sample: Any
    uncertainty: float
    age: int = 0


class SampleMemory:
    """Category-balanced memory with timeliness and uncertainty (CSTU; Yuan et al., CVPR 2023, section 3.3).

    Each class has room for ``capacity / classes`` samples, at least one more than the whole part of it. A sample that finds its
    class full, or the memory, replaces the one with the highest score, if its own is lower.

    Args:
        capacity: Samples in all.
        classes: Number of classes.
        timeliness: Weight of the age in the score.
        uncertainty: Weight of the uncertainty in the score.

    Example:
        >>> memory = SampleMemory(4, 2)
        >>> for label, unsure in [(0, 0.1), (0, 0.2), (0, 0.05), (1, 0.3), (1, 0.0), (0, 0.6)]:
        ...     memory.add(label, f"{label}/{unsure}", unsure)
        >>> [(kept.sample, kept.age) for kept in memory.kept()]
        [('0/0.1', 6), ('0/0.05', 4), ('1/0.3', 3), ('1/0.0', 2)]
    """

    def __init__(self, capacity: int, classes: int, timeliness: float = 1.0, uncertainty: float = 1.0) -> None:
        self.capacity, self.classes = capacity, classes
        self.timeliness, self.uncertainty = timeliness, uncertainty
        self._classes: list[list[StoredSample]] = [[] for _ in range(classes)]

    def kept(self) -> list[StoredSample]:
        """Everything in memory, by class."""
        return [kept for group in self._classes for kept in group]

    def add(self, label: int, sample: Any, uncertainty: float) -> None:
        """Offer a sample; whether or not it is taken, all in memory grow older by one."""
        score = self._score(0, uncertainty)
        if self._make_room(label, score):
            self._classes[label].append(StoredSample(sample, uncertainty))
        for kept in self.kept():
            kept.age += 1

    def keep(self, which: list[bool]) -> None:
        """Drop samples of :meth:`kept` that are marked ``False``."""
        marks = iter(which)
        self._classes = [[kept for kept in group if next(marks)] for group in self._classes]

    def _score(self, age: int, uncertainty: float) -> float:
        return self.timeliness / (1 + math.exp(-age / self.capacity)) + self.uncertainty * uncertainty / math.log(self.classes)

    def _make_room(self, label: int, score: float) -> bool:
        if len(self._classes[label]) >= self.capacity / self.classes:
            return self._replace([label], score)
        if len(self.kept()) < self.capacity:
            return True
        largest = max(len(group) for group in self._classes)
        return self._replace([i for i, group in enumerate(self._classes) if len(group) == largest], score)

    def _replace(self, labels: list[int], score: float) -> bool:
        """Drop the worst of some classes if it is worse than a newcomer of this score; among equals the last."""
        worst: tuple[int, int] | None = None
        highest = 0.0
        for label in labels:
            for place, kept in enumerate(self._classes[label]):
                found = self._score(kept.age, kept.uncertainty)
                if found >= highest:
                    highest, worst = found, (label, place)
        if worst is None:
            return True
        if highest <= score:
            return False
        del self._classes[worst[0]][worst[1]]
        return True

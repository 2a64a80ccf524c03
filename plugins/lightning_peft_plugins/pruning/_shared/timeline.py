"""When masks are chosen, and how much is pruned by then."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_peft import Run, Schedule
from lightning_peft.compose.schedule import Point, ResolvedSchedule


@dataclass(frozen=True)
class PruningTimeline:
    """Moments of choice, in optimizer steps.

    Attributes:
        amounts: Share of pruned weights by step.
        every: Steps between choices from the start of ``amounts`` to its end, which is always one.
    """

    amounts: ResolvedSchedule
    every: int

    @classmethod
    def of_choices(cls, schedule: Schedule, every: Point, run: Run, *, watched: bool) -> PruningTimeline:
        """Place the choices of masks in a training.

        Args:
            schedule: Amounts.
            every: Length between choices.
            run: The training.
            watched: Whether the first choice waits until something was seen for ``every`` steps.
        """
        amounts = run.resolve(schedule)
        # One choice that waits for nothing needs no length, so neither does the training.
        length = max(1, run.place(every, "every=")) if watched or amounts.end > amounts.start else 1
        first = max(length if watched else 0, amounts.start)
        return cls(replace(amounts, start=first, end=max(first, amounts.end)), length)

    @classmethod
    def of_cuts(cls, schedule: Schedule, every: Point, run: Run, *, watched: bool) -> PruningTimeline:
        """Place the cuts of a network in a training, which goes on after the last of them; see :meth:`of_choices`."""
        line = cls.of_choices(schedule, every, run, watched=watched)
        first = max(1, line.amounts.start)
        # The last cut must leave a step to train, or nothing would follow it.
        end = run.end
        last = max(first, line.amounts.end if end is None else min(line.amounts.end, end - 1))
        return replace(line, amounts=replace(line.amounts, start=first, end=last))

    def due(self, step: int) -> bool:
        """Whether masks are chosen after so many steps.

        Example:
            >>> line = PruningTimeline(ResolvedSchedule(10, 25, "cubic", (0.0, 0.5)), every=10)
            >>> [step for step in range(40) if line.due(step)]
            [10, 20, 25]
        """
        first, last = self.amounts.start, self.amounts.end
        return step == last or (first <= step < last and (step - first) % self.every == 0)

    def watched(self, step: int) -> bool:
        """Whether what happens in the step after so many bears on a choice: the ``every`` steps before each of them do.

        Example:
            >>> line = PruningTimeline(ResolvedSchedule(10, 10, "constant", (0.0, 0.5)), every=4)
            >>> [step for step in range(40) if line.watched(step)]
            [6, 7, 8, 9]
        """
        return self.amounts.start - self.every <= step < self.amounts.end

    def progress(self, step: int) -> float:
        """How much of the way from the first choice to the last is done, from 0 to 1.

        Example:
            >>> line = PruningTimeline(ResolvedSchedule(10, 30, "cubic", (0.0, 0.5)), every=10)
            >>> [line.progress(step) for step in (0, 10, 15, 30, 40)]
            [0.0, 0.0, 0.25, 1.0, 1.0]
        """
        first, last = self.amounts.start, self.amounts.end
        return min(max((step - first) / max(last - first, 1), 0.0), 1.0)

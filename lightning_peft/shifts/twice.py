"""Test sets under two shifts at once, one on top of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

from lightning_peft.shifts.data import CLEAN, Part, ShiftedData


@runtime_checkable
class TwiceShiftedData(ShiftedData, Protocol):
    """Data under shift whose test set also exists under two shifts, the second made of what the first left."""

    def shifted_twice(self, shift: str, severity: int, second: str, second_severity: int) -> Dataset[Any]:
        """The test set under two shifts, in the order of the clean one; both severities are above 0."""


@dataclass(frozen=True)
class TwoShifts(Part):
    """A test set under a second shift on top of the first.

    Attributes:
        second: Name of the second shift.
        second_severity: Its severity.

    Example:
        >>> str(TwoShifts("fog", 2, "snow", 1))
        'fog 2 + snow 1'
    """

    second: str = ""
    second_severity: int = 0

    def __str__(self) -> str:
        return f"{Part(self.shift, self.severity)} + {Part(self.second, self.second_severity)}"


def under(first: str, severity: int, second: str, second_severity: int) -> Part:
    """The test set under two shifts, of which those of severity 0 are none.

    Example:
        >>> print(under("fog", 2, "snow", 0), "|", under("fog", 0, "snow", 0), "|", under("fog", 1, "snow", 3))
        fog 2 | clean | fog 1 + snow 3
    """
    if severity and second_severity:
        return TwoShifts(first, severity, second, second_severity)
    return Part(first, severity) if severity else Part(second, second_severity) if second_severity else CLEAN


def shifted_set(data: ShiftedData, part: Part) -> Dataset[Any]:
    """The test set that a part names.

    Args:
        data: After ``prepare_data`` and ``setup("test")``.
        part: Clean, under one shift or under two.

    Raises:
        MisconfigurationException: The data has no test sets under two shifts.
    """
    if part == CLEAN:
        return data.test_dataloader().dataset
    if not isinstance(part, TwoShifts):
        return data.shifted(part.shift, part.severity)
    if not isinstance(data, TwiceShiftedData):
        raise MisconfigurationException(
            f"{type(data).__name__} has no test set under {part}. Give it shifted_twice(shift, severity, second, "
            "second_severity), as lightning_peft.shifts.TwiceShiftedData describes."
        )
    return data.shifted_twice(part.shift, part.severity, part.second, part.second_severity)

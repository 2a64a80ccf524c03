"""The parts of a report: facts, tables, figures and sections, and how their cells are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Cell = str | float | int | bool | None


@dataclass(frozen=True)
class Fact:
    """A number worth reading first.

    Attributes:
        label: What it is.
        value: The number, formatted.
        note: What it is compared with, or what it means.
        good: Whether it is what was hoped for; ``None`` when that is not for a report to say.
    """

    label: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Table:
    """A table; columns whose cells are numbers are aligned to the right.

    Attributes:
        columns: Headings.
        rows: Cells, one tuple a row.
        caption: One line about it.
        folded: Whether HTML shows it only when asked.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot, drawn when it is needed, once for each theme.

    Attributes:
        name: File name without ending.
        caption: What is seen.
        draw: Returns a matplotlib figure; called inside the theme's ``rc_context``.
    """

    name: str
    caption: str
    draw: Callable[[], Canvas]


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Heading.
        text: Paragraphs.
        tables: Tables.
        figures: Figures.
        code: Text to show as it is, such as the printed plan.
    """

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    code: str = ""


@dataclass(frozen=True)
class Contents:
    """The contents of a report.

    Attributes:
        title: Heading.
        subtitle: One line below it.
        facts: The numbers to read first.
        sections: The rest, in order.
        data: Everything in numbers, as plain data; this is what JSON readers want.
        made_by: Command that produced it.
    """

    title: str
    subtitle: str = ""
    facts: tuple[Fact, ...] = ()
    sections: tuple[Section, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    made_by: str = ""

    def figures(self) -> list[Figure]:
        """Return all figures in order."""
        return [figure for section in self.sections for figure in section.figures]


def number(value: float | int | None, digits: int = 4) -> str:
    """Write a number for people.

    Example:
        >>> number(3371168), number(0.12345678), number(None), number(1e-7), number(2.0)
        ('3,371,168', '0.1235', '', '1e-07', '2.0')
    """
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 10**-digits:
        return f"{value:.0e}"
    text = f"{value:,.{digits}f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def cell(value: Cell) -> str:
    """Write a table cell for people.

    Example:
        >>> [cell(value) for value in (True, None, "2:4", 1234)]
        ['yes', '', '2:4', '1,234']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value)


def is_numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers, and so is aligned to the right."""
    cells = [row[column] for row in table.rows if row[column] not in (None, "")]
    return bool(cells) and all(_number_like(item) for item in cells)


def _number_like(item: Cell) -> bool:
    if isinstance(item, str):
        return item[:1].isdigit() or (item[:1] in "+-" and item[1:2].isdigit())
    return not isinstance(item, bool)

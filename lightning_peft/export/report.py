"""The report: facts, tables and figures about one training, written as Markdown, as one HTML file, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.files import whole

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
class Report:
    """A report.

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

    def to_json(self) -> str:
        """Return the report's data as JSON."""
        return to_json({"title": self.title, "made_by": self.made_by, **self.data})

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``report.html``, ``report.md``, ``report.json`` and one PNG a figure.

        Without matplotlib (extra ``report``) everything but the plots is written, and the report says how to get them.

        Args:
            folder: Where to write; created when missing.

        Returns:
            The files.
        """
        from lightning_peft.export.report_html import to_html
        from lightning_peft.export.report_markdown import to_markdown
        from lightning_peft.export.report_plots import render

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        images = render(self.figures())
        files = {
            "report.html": to_html(self, images).encode(),
            "report.md": to_markdown(self, plots=bool(images)).encode(),
            "report.json": self.to_json().encode(),
            **{f"{name}.png": themes["light"] for name, themes in images.items()},
        }
        for name, content in files.items():
            with whole(folder / name) as part:
                part.write_bytes(content)
        return [folder / name for name in files]


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


def to_json(data: Any) -> str:
    r"""Return plain data as JSON that every reader accepts: numbers that are not finite become ``null``.

    Example:
        >>> print(to_json({"loss": float("nan"), "shape": (2, 3)}).replace("\n", ""))
        {  "loss": null,  "shape": [    2,    3  ]}
    """
    return json.dumps(_finite(data), indent=2, default=str, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

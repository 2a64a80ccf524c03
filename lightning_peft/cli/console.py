"""The result of every command: data for machines, and a way to show it to people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lightning_peft.report.contents import Fact, Table, cell, is_numeric


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        data: Plain data, printed by ``--json``.
        show: Prints the same for people.
    """

    data: Any
    show: Callable[[Console], None]


def grid(table: Table, cut: tuple[str, ...] = ()) -> RenderableType:
    """Return a report's table for the terminal; columns named in ``cut`` share the width that is left."""
    shown = RichTable(
        box=None, header_style="dim", pad_edge=False, padding=(0, 2), title=table.caption or None, expand=bool(cut)
    )
    shown.title_justify = "left"
    shown.title_style = "bold"
    for index, head in enumerate(table.columns):
        side: Literal["left", "right"] = "right" if is_numeric(table, index) else "left"
        once = head in cut
        shown.add_column(
            head,
            justify=side,
            style="bold" if index == 0 else None,
            no_wrap=bool(cut) or side == "right",
            overflow="ellipsis" if once else "fold",
            ratio=1 if once else None,
        )
    for row in table.rows:
        shown.add_row(*(Text(cell(item)) for item in row))
    return shown


def facts(items: tuple[Fact, ...]) -> RenderableType:
    """Return a report's facts for the terminal."""
    shown = RichTable(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for item in items:
        mood = {True: "green", False: "red", None: ""}[item.good]
        shown.add_row(Text(item.label, style="dim"), Text(item.value, style=f"bold {mood}".strip()), Text(item.note))
    return shown

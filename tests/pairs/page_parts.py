"""Parts of the pages in ``docs/compatibility``: tables, paragraphs, and what outcomes amount to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from textwrap import wrap

from verdicts import BREAKS, REJECTED, WORKS, Verdict


def paragraph(text: str) -> list[str]:
    """Lines of a paragraph."""
    return wrap(text, 120)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; "Nothing." when it has no rows.

    Example:
        >>> table(["method", "networks"], [["Tent", 3]])
        ['| method | networks |', '| --- | --- |', '| Tent | 3 |']
    """
    lines = [_row(row) for row in rows]
    return [_row(head), "|" + " --- |" * len(head), *lines] if lines else ["Nothing."]


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def counted(outcomes: Iterable[Verdict]) -> str:
    """How many work, are rejected and break, as a clause.

    Example:
        >>> counted([Verdict(WORKS), Verdict(REJECTED, "why"), Verdict(WORKS)])
        '**2 of 3 work (+), 1 are rejected in words (-), 0 break (!)**'
    """
    counts = Counter(each.what for each in outcomes)
    return (
        f"**{counts[WORKS]} of {counts.total()} work (+), {counts[REJECTED]} are rejected in words (-), "
        f"{counts[BREAKS]} break (!)**"
    )

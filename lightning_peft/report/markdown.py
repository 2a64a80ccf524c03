"""A report as Markdown."""

from __future__ import annotations

from lightning_peft.report.contents import Contents, Section, Table, cell, is_numeric

NO_PLOTS = 'Plots need matplotlib: `pip install "lightning-peft[report]"`, then make the report again.'


def to_markdown(report: Contents, *, plots: bool = True) -> str:
    """Render a report as Markdown that refers to the figures' PNG files.

    Args:
        report: The report.
        plots: Whether the PNG files exist; otherwise it says how to get them.
    """
    parts = [f"# {report.title}"]
    if report.subtitle:
        parts.append(report.subtitle)
    if report.facts:
        parts.append(
            "\n".join(f"- **{fact.label}:** {fact.value}{f' ({fact.note})' if fact.note else ''}" for fact in report.facts)
        )
    for section in report.sections:
        parts.extend(_section(section, plots))
    if report.figures() and not plots:
        parts.append(NO_PLOTS)
    if report.made_by:
        parts.append(f"Made by `{report.made_by}`.")
    return "\n\n".join(parts) + "\n"


def _section(section: Section, plots: bool) -> list[str]:
    parts = [f"## {section.title}", *section.text]
    if section.code:
        parts.append(f"```text\n{section.code}\n```")
    parts.extend(table_to_markdown(table) for table in section.tables)
    if plots:
        parts.extend(f"![{figure.caption}]({figure.name}.png)" for figure in section.figures)
    return parts


def table_to_markdown(table: Table) -> str:
    """Render one table, its caption above it.

    Example:
        >>> print(table_to_markdown(Table(("layer", "density"), (("fc", 0.5),))))
        | layer | density |
        | --- | ---: |
        | fc | 0.5 |
    """
    rules = ["---:" if is_numeric(table, column) else "---" for column in range(len(table.columns))]
    rows = [table.columns, tuple(rules), *(tuple(_escaped(cell(item)) for item in row) for row in table.rows)]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{table.caption}\n\n{lines}" if table.caption else lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

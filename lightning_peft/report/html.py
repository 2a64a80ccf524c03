"""A report as one HTML file: styles and plots inline, light or dark as the reader's system, fit for print."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from lightning_peft.report.contents import Contents, Fact, Figure, Section, Table, cell, is_numeric
from lightning_peft.report.markdown import NO_PLOTS

STYLE = """
:root{--paper:#f7f6f3;--card:#fff;--ink:#1d2127;--soft:#5d6570;--line:#e2dfd8;--accent:#2a6f97;--good:#2d7a4f;--bad:#a8482f;
--code:#f1efe9;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2026;--ink:#e6e4df;--soft:#9aa2ad;--line:#30363e;
--accent:#7fb6d6;--good:#7cc49a;--bad:#e39a82;--code:#232830}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1040px;margin:0 auto;padding:52px 28px 72px}
h1{font-size:2.05rem;line-height:1.15;letter-spacing:-.02em;margin:0 0 14px;font-weight:680}
.sub{color:var(--soft);margin:0 0 30px;max-width:46rem;font-size:1.03rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:14px;margin:0 0 46px}
.fact{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:15px 16px 14px;
border-top:3px solid var(--line)}
.fact.good{border-top-color:var(--good)}.fact.bad{border-top-color:var(--bad)}
.fact dt{color:var(--soft);font-size:.84rem}
.fact dd{margin:3px 0 2px;font-size:1.5rem;font-weight:640;letter-spacing:-.02em;line-height:1.25;white-space:nowrap}
.fact p{margin:0;color:var(--soft);font-size:.84rem;line-height:1.4}
section{margin:0 0 46px}
h2{font-size:1.22rem;letter-spacing:-.01em;margin:0 0 14px;padding-bottom:8px;border-bottom:1px solid var(--line);
font-weight:640}
section>p{max-width:46rem;margin:0 0 14px}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0 0 18px}
table{border-collapse:collapse;width:100%;font-size:.91rem}
th,td{padding:8px 16px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:560;font-size:.84rem;white-space:nowrap}
tr:last-child td{border-bottom:0}
.n{text-align:right;white-space:nowrap}
td:first-child{font-weight:520}
.cap,figcaption,summary{color:var(--soft);font-size:.88rem}
.cap{margin:0 0 8px}
details{margin:0 0 18px}summary{cursor:pointer;margin-bottom:10px}
figure{margin:0 0 20px;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px 13px}
figure img{display:block;width:100%;height:auto;margin:0 0 8px}
pre{background:var(--code);border:1px solid var(--line);border-radius:10px;padding:14px 18px;overflow-x:auto;margin:0 0 18px;
font:11.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--code);
padding:.1em .35em;border-radius:4px}
footer{color:var(--soft);font-size:.85rem;border-top:1px solid var(--line);padding-top:14px}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--code:#f6f6f6}main{padding:0;max-width:none}
figure,.fact,tr{break-inside:avoid}h2{break-after:avoid}body{font-size:11pt}}
"""

Images = Mapping[str, Mapping[str, bytes]]


def to_html(report: Contents, images: Images) -> str:
    """Render a report as one self-contained HTML page.

    Args:
        report: The report.
        images: PNG bytes of each figure by name and theme (``"light"``, ``"dark"``); empty without matplotlib.
    """
    body = [f"<h1>{escape(report.title)}</h1>"]
    if report.subtitle:
        body.append(f'<p class="sub">{escape(report.subtitle)}</p>')
    if report.facts:
        body.append(f'<dl class="facts">{"".join(map(_fact, report.facts))}</dl>')
    body.extend(_section(section, images) for section in report.sections)
    if report.figures() and not images:
        body.append(f"<p>{_text(NO_PLOTS)}</p>")
    if report.made_by:
        body.append(f"<footer>Made by <code>{escape(report.made_by)}</code></footer>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _fact(fact: Fact) -> str:
    mood = "" if fact.good is None else " good" if fact.good else " bad"
    note = f"<p>{escape(fact.note)}</p>" if fact.note else ""
    return f'<div class="fact{mood}"><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}</dd>{note}</div>'


def _section(section: Section, images: Images) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", *(f"<p>{_text(paragraph)}</p>" for paragraph in section.text)]
    if section.code:
        parts.append(f"<pre>{escape(section.code)}</pre>")
    parts.extend(_table(table) for table in section.tables)
    parts.extend(_figure(figure, images[figure.name]) for figure in section.figures if figure.name in images)
    return f"<section>{''.join(parts)}</section>"


def _table(table: Table) -> str:
    numeric = [is_numeric(table, column) for column in range(len(table.columns))]

    def row(tag: str, cells: list[str]) -> str:
        classes = [' class="n"' if right else "" for right in numeric]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{_text(item)}</{tag}>" for kind, item in zip(classes, cells, strict=True)) + "</tr>"
        )

    head = row("th", list(table.columns))
    rows = "".join(row("td", [cell(item) for item in cells]) for cells in table.rows)
    grid = f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    if table.folded:
        return f"<details><summary>{escape(table.caption)}</summary>{grid}</details>"
    return (f'<p class="cap">{escape(table.caption)}</p>' if table.caption else "") + grid


def _figure(figure: Figure, themes: Mapping[str, bytes]) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(themes[theme]).decode()}" for theme in ("light", "dark"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(figure.caption)}" src="{light}"></picture>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _text(text: str) -> str:
    """Escape text and turn its `backticks` into code."""
    pieces = escape(text).split("`")
    if len(pieces) % 2 == 0:
        return "`".join(pieces)
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))

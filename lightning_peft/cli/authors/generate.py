"""Everything that is derived from the entry points and the heads of the cards, written by one command.

``make generate`` writes what is stale, ``python -m lightning_peft.cli.authors.generate --check`` only says what is.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_peft.cli.authors.checkout import Checkout, RegisteredMethod
from lightning_peft.cli.card_heads import GOALS
from lightning_peft.cli.recipes import UsageError

COMMAND = "make generate"
BEGIN, END = f"<!-- written by `{COMMAND}` from the heads of the cards -->\n", "<!-- end -->\n"


def derived(checkout: Checkout) -> dict[Path, str | None]:
    """Return what every derived file should hold, by path from the root; ``None`` for a page whose method is gone.

    Raises:
        UsageError: A card is missing or incomplete, or a page has no place for the table.
    """
    methods = checkout.methods()
    pages: dict[Path, str | None] = dict.fromkeys(_pages(checkout.root))
    pages |= {Path("docs", "methods", f"{method.name}.md"): page(method) for method in methods}
    return {
        Path("lightning_peft", "__init__.pyi"): stub(checkout),
        Path("README.md"): _filled(checkout.root, "README.md", _tables(methods, in_docs=False)),
        Path("docs", "index.md"): _filled(checkout.root, "docs/index.md", _tables(methods, in_docs=True)),
        **pages,
    }


def stale(checkout: Checkout) -> list[Path]:
    """Return the derived files that are not what they should be."""
    return [path for path, text in derived(checkout).items() if _read(checkout.root / path) != text]


def write(checkout: Checkout) -> list[Path]:
    """Write every derived file that is stale, and return which those were."""
    changed = []
    for path, text in derived(checkout).items():
        place = checkout.root / path
        if _read(place) == text:
            continue
        if text is None:
            place.unlink()
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        changed.append(path)
    return changed


def stub(checkout: Checkout) -> str:
    """Return the stub of the package, which shows type checkers and editors the names that are loaded on first use."""
    homes, folders = _names(checkout.root / "lightning_peft" / "__init__.py")
    found = [(f"lightning_peft.{module}", name) for name, module in homes.items()]
    found += [(value.partition(":")[0], name) for name, value in checkout.points().items()]
    lines = [f"from lightning_peft import {name} as {name}" for name in folders]
    lines += [f"from {module} import {name} as {name}" for module, name in sorted(found)]
    return "\n".join([*lines, "", "__version__: str", ""])


def page(method: RegisteredMethod) -> str:
    """Return a method's page: its head as a table, its card, its class."""
    head = method.head
    facts = {"for": ", ".join(head.goals), "data": ", ".join(head.domains), "needs": head.needs, "saves": head.saves}
    facts |= {"cost": head.cost, "paper": head.paper, "official code": f"{head.code} ({head.licence})"}
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return (
        f"# {method.name}\n\n| | |\n| --- | --- |\n{rows}\n"
        f'--8<-- "{method.card.as_posix()}:{method.title_line + 2}"\n\n'
        f"## API\n\n::: {method.value.replace(':', '.')}\n    options: {{heading_level: 3}}\n"
    )


def _tables(methods: Sequence[RegisteredMethod], *, in_docs: bool) -> str:
    """Return a table for each goal, of the methods whose first goal it is; others that serve it are named below."""
    parts = []
    for goal, meaning in GOALS.items():
        main = [method for method in methods if method.head.goals[0] == goal]
        also = [method for method in methods if goal in method.head.goals[1:]]
        columns = ["method", "what it does"] if in_docs else ["method", "what it does", "paper"]
        lines = [f"**{goal.capitalize()}**: {meaning}", "", _row(columns), _row(["---"] * len(columns))]
        for method in main:
            cells = [_link(method, in_docs), method.summary, method.head.paper]
            lines.append(_row(cells[: len(columns)]))
        if also:
            lines += ["", f"Also: {', '.join(_link(method, in_docs) for method in also)}."]
        if main or also:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _link(method: RegisteredMethod, in_docs: bool) -> str:
    return f"[`{method.name}`]({f'methods/{method.name}.md' if in_docs else method.card.as_posix()})"


def _filled(root: Path, name: str, tables: str) -> str:
    text = (root / name).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"{name} has no place for the methods: the lines {BEGIN.strip()} and {END.strip()} are missing.")
    return f"{before}{BEGIN}\n{tables}\n\n{END}{after}"


def _names(package: Path) -> tuple[dict[str, str], list[str]]:
    """Read where the engine's own public names live, and which subpackages it offers."""
    values = {}
    for node in ast.parse(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in _TABLES:
            values[node.targets[0].id] = ast.literal_eval(node.value)
    return values["_HOMES"], sorted(values["_SUBPACKAGES"])


_TABLES = ("_HOMES", "_SUBPACKAGES")


def _pages(root: Path) -> list[Path]:
    return [path.relative_to(root) for path in sorted((root / "docs" / "methods").glob("*.md"))]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Write what is stale, or with ``--check`` name it; the exit code is 1 when the check finds something."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something is stale")
    options = parser.parse_args(argv)
    checkout = Checkout.around(Path.cwd())
    try:
        if checkout is None:
            raise UsageError("This is not a checkout of lightning_peft. Run the command in one.")
        found = stale(checkout) if options.check else write(checkout)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in found:
        print(f"{'stale' if options.check else 'wrote'} {path}")
    if options.check and found:
        print(f"Run {COMMAND}.", file=sys.stderr)
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""`list` and `show`: what is installed, and the card of one method or merge function."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

import lightning_peft
from lightning_peft import registry
from lightning_peft.cli.card_heads import DOMAINS, GOALS, CardHead
from lightning_peft.cli.cards import card_of, head_of, missing, summary_of
from lightning_peft.cli.console import Outcome, grid
from lightning_peft.cli.recipes import UsageError, packaged
from lightning_peft.report.contents import Table


def list_for(wishes: str) -> Outcome:
    """List the methods whose cards say that they serve all wishes, with their main costs.

    Args:
        wishes: Goals, domains or words, separated by commas.

    Raises:
        UsageError: No method serves them; what cards can be asked for is listed.
    """
    found, merges = (
        [item for item in map(_method, entries.values()) if _serves(item, wishes)]
        for entries in (registry.installed(), registry.merge_functions())
    )
    if not found and not merges:
        raise UsageError(
            f"No method is for {wishes!r}. Goals: {', '.join(GOALS)}. Domains: {', '.join(DOMAINS)}. Give one of them, or "
            "words from the head of a card; separate several by commas."
        )

    def show(console: Console) -> None:
        console.print(f"[bold]Methods for[/] {wishes}\n")
        for item in [*found, *merges]:
            console.print(Text.assemble((item["name"], "bold"), "  ", item["summary"]))
            for field in ("needs", "saves", "cost"):
                if words := item["head"][field]:
                    console.print(Padding(Text.assemble((f"{field}: ", "dim"), words), (0, 0, 0, 2)))
        console.print("\n[dim]lightning-peft show METHOD[/]")

    return Outcome({"for": wishes, "methods": found, "merges": merges}, show)


def _serves(item: dict[str, Any], wishes: str) -> bool:
    return not item["error"] and CardHead(**item["head"]).serves(wishes, item["summary"])


def list_all() -> Outcome:
    """List what is installed without importing any of it; what is not installed as it says is listed as broken."""
    methods = [_method(entry) for entry in registry.installed().values()]
    merges = [_method(entry) for entry in registry.merge_functions().values()]
    recipes = [{**asdict(recipe), "path": str(recipe.path), "needs": list(recipe.needs)} for recipe in packaged().values()]

    def show(console: Console) -> None:
        console.print("[bold]Methods[/]")
        console.print(_method_rows(methods))
        console.print("\n[bold]Ways to merge models[/]")
        console.print(_method_rows(merges))
        console.print("\n[bold]Recipes[/]\n")
        console.print(_recipe_rows(recipes))
        commands = ("show METHOD", "merge MODEL MODEL", "run RECIPE, or adapt RECIPE")
        console.print("\n[dim]" + "\n".join(f"lightning-peft {command}" for command in commands) + "[/]")

    return Outcome({"methods": methods, "merges": merges, "recipes": recipes}, show)


def _method(entry: registry.MethodEntry) -> dict[str, Any]:
    error = missing(entry)
    return {
        "name": entry.name,
        "family": entry.family,
        "summary": summary_of(entry),
        "package": f"{entry.distribution} {entry.version}",
        "class": entry.value,
        "head": asdict(CardHead() if error else head_of(entry)),
        "error": error,
    }


def _method_rows(methods: list[dict[str, Any]]) -> RichTable:
    """One row a method below the heading of its family; methods of other packages stand below the name of theirs."""
    table = RichTable(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))  # 19 + 1 + 60 columns
    table.add_column(no_wrap=True)
    table.add_column()
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in methods:
        ours = item["package"].startswith("lightning-peft ")
        groups.setdefault(item["family"].replace("_", " ") if ours else item["package"], []).append(item)
    for group, members in sorted(groups.items()):
        table.add_row("", "")
        table.add_row(Text(group, style="dim"), "")
        for item in members:
            what = f"broken: {item['error']} ({item['class']})" if item["error"] else item["summary"]
            table.add_row(Text(item["name"], style="bold"), Text(what))
    return table


def _recipe_rows(recipes: list[dict[str, Any]]) -> RichTable:
    """Two rows a recipe: what it takes, then, over the whole width, what it is."""
    table = RichTable(box=None, show_header=False, pad_edge=False, padding=0)
    for item in recipes:
        facts = [item["command"], f"{item['minutes']} min" if item["minutes"] else "", ", ".join(item["needs"])]
        table.add_row(Text.assemble((item["name"], "bold"), ("  " + ", ".join(filter(None, facts)), "dim")))
        table.add_row(Padding(Text(item["summary"]), (0, 0, 0, 2)))
    return table


def show_method(name: str) -> Outcome:
    """Show the card of a method or merge function: what it is, its arguments, and what its authors wrote beside its module.

    Raises:
        UsageError: There is no such method.
        MisconfigurationException: Its package cannot be imported.
    """
    methods, merges = registry.installed(), registry.merge_functions()
    known = {**merges, **methods}
    exact = {each.lower(): each for each in known}.get(name.lower())
    if exact is None:
        raise UsageError(f"There is no method {name!r}.{registry.suggest(name, list(known))}")
    entry = known[exact]
    try:
        head = head_of(entry)
    except ValueError as error:
        raise UsageError(f"The head of the card of {exact} cannot be read: {error}.") from error
    loaded = entry.load()
    merging = exact not in methods
    text, own = _docstring(loaded)
    arguments = own if merging else _arguments(loaded)
    parameters = [
        {
            "name": parameter.name,
            "type": parameter.annotation if isinstance(parameter.annotation, str) else str(parameter.annotation),
            "default": None if parameter.default is parameter.empty else repr(parameter.default),
            "meaning": arguments.get(parameter.name, ""),
        }
        for parameter in inspect.signature(loaded).parameters.values()
        if not merging or parameter.kind is parameter.KEYWORD_ONLY  # the others are not the user's to choose
    ]
    card = card_of(entry)
    data = {
        "name": exact,
        "function" if merging else "class": entry.value,
        "package": f"{entry.distribution} {entry.version}",
        **({} if merging else _of_class(loaded)),
        "head": asdict(head),
        "text": text,
        "arguments": parameters,
        "card": card,
    }

    def show(console: Console) -> None:
        place = "merges models" if merging else f"lane {data['lane']}"
        console.print(f"[bold]{exact}[/]  [dim]{data['package']}, {place}[/]\n")
        console.print(Markdown(text))
        console.print(f"\n[dim]{data.get('paper', '')}[/]\n" if not merging else "", highlight=False)
        for field, value in data["head"].items():
            if value:
                words = ", ".join(value) if isinstance(value, (list, tuple)) else value
                console.print(Text.assemble((f"{field}: ", "dim"), words))
        rows = tuple((item["name"], item["default"] or "required", item["meaning"]) for item in parameters)
        if rows:
            console.print(grid(Table(("option" if merging else "argument", "default", "meaning"), rows)))
        if card:
            console.print()
            console.print(Markdown(card))

    return Outcome(data, show)


def _of_class(method: Any) -> dict[str, Any]:
    """What the class of a method says of itself."""
    return {
        "lane": method.lane.name,
        "reads": sorted(resource.value for resource in method.reads),
        "writes": sorted(resource.value for resource in method.writes),
        "paper": method.paper,
    }


def _arguments(method: type) -> dict[str, str]:
    """Return the meaning of each argument: as the class says, else as the nearest class that it inherits the argument from."""
    meanings: dict[str, str] = {}
    for base in reversed(method.__mro__):
        # Docstrings of Lightning and torch do not speak of our arguments.
        if base.__doc__ and issubclass(base, lightning_peft.Method):
            meanings |= _docstring(base)[1]
    return meanings


def _docstring(described: Any) -> tuple[str, dict[str, str]]:
    """Split a Google-style docstring into its prose and the meaning of each argument."""
    from docstring_parser import parse

    parsed = parse(inspect.cleandoc(described.__doc__ or ""))
    prose = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    plain = prose.replace("``", "`")
    arguments = [item for item in parsed.params if item.args[0] == "param"]  # the others are attributes
    return plain, {item.arg_name: " ".join((item.description or "").replace("``", "`").split()) for item in arguments}

"""`list` and `show`: what is installed, and the card of one method."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.markdown import Markdown

from lightning_peft import registry
from lightning_peft.cli.console import Outcome, grid
from lightning_peft.cli.recipes import UsageError, packaged
from lightning_peft.export.report import Table


def list_all() -> Outcome:
    """List methods and recipes; a plugin that cannot be imported is listed as broken and stops nobody."""
    methods = [_method(entry) for entry in registry.installed().values()]
    recipes = [{**asdict(recipe), "path": str(recipe.path), "needs": list(recipe.needs)} for recipe in packaged().values()]

    def show(console: Console) -> None:
        console.print(grid(_method_table(methods), cut=("paper",)))
        console.print()
        shown = ("name", "command", "summary")
        rows = tuple((*(item[key] for key in shown), ", ".join(item["needs"]), item["minutes"] or None) for item in recipes)
        console.print(grid(Table(("recipe", "for", "what", "needs", "minutes"), rows, "Recipes")))
        console.print("\n[dim]lightning-peft show METHOD    lightning-peft run RECIPE    lightning-peft adapt RECIPE[/]")

    return Outcome({"methods": methods, "recipes": recipes}, show)


def _method_table(methods: list[dict[str, Any]]) -> Table:
    rows = tuple(
        (item["name"], item["family"], item["lane"] or "broken", item["paper"] or item["error"], item["package"])
        for item in methods
    )
    return Table(("method", "family", "lane", "paper", "package"), rows, "Methods")


def _method(entry: registry.MethodEntry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": entry.name,
        "family": entry.family,
        "lane": None,
        "paper": "",
        "package": f"{entry.distribution} {entry.version}",
        "class": entry.value,
        "error": "",
    }
    try:
        method = entry.load()
        found |= {"lane": method.lane.name, "paper": method.paper}
    except (MisconfigurationException, AttributeError) as error:
        found["error"] = str(error)
    return found


def show_method(name: str) -> Outcome:
    """Show a method's card: what it is, its arguments, and what its authors wrote beside its module.

    Raises:
        UsageError: There is no such method.
        MisconfigurationException: Its package cannot be imported.
    """
    entries = registry.installed()
    exact = {known.lower(): known for known in entries}.get(name.lower())
    if exact is None:
        raise UsageError(f"There is no method {name!r}.{registry.suggest(name, list(entries))}")
    entry = entries[exact]
    method = entry.load()
    text, arguments = _docstring(inspect.getdoc(method) or "")
    parameters = [
        {
            "name": parameter.name,
            "type": parameter.annotation if isinstance(parameter.annotation, str) else str(parameter.annotation),
            "default": None if parameter.default is parameter.empty else repr(parameter.default),
            "meaning": arguments.get(parameter.name, ""),
        }
        for parameter in inspect.signature(method).parameters.values()
    ]
    card = card_of(entry)
    data = {
        "name": exact,
        "class": entry.value,
        "package": f"{entry.distribution} {entry.version}",
        "lane": method.lane.name,
        "reads": sorted(resource.value for resource in method.reads),
        "writes": sorted(resource.value for resource in method.writes),
        "paper": method.paper,
        "text": text,
        "arguments": parameters,
        "card": card,
    }

    def show(console: Console) -> None:
        console.print(f"[bold]{exact}[/]  [dim]{data['package']}, lane {data['lane']}[/]\n")
        console.print(Markdown(text))
        console.print(f"\n[dim]{method.paper}[/]\n", highlight=False)
        rows = tuple((item["name"], item["default"] or "required", item["meaning"]) for item in parameters)
        console.print(grid(Table(("argument", "default", "meaning"), rows)))
        if card:
            console.print()
            console.print(Markdown(card))

    return Outcome(data, show)


def card_of(entry: registry.MethodEntry) -> str:
    """Return the method's packaged card, ``cards/<Name>.md`` beside its module; empty when there is none."""
    spec = find_spec(entry.value.partition(":")[0])
    if spec is None or spec.origin is None:
        return ""
    path = Path(spec.origin).parent / "cards" / f"{entry.name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a Google-style docstring into its prose and the meaning of each argument."""
    from docstring_parser import parse

    parsed = parse(text)
    prose = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    plain = prose.replace("``", "`")
    return plain, {item.arg_name: " ".join((item.description or "").replace("``", "`").split()) for item in parsed.params}

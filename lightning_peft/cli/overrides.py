"""Overrides by name: `--NMSparsity.pattern 1:4` sets one argument of one callback, wherever it stands in the list.

LightningCLI reaches the last callback of a list only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_peft import registry
from lightning_peft.cli.classes import class_name, import_class
from lightning_peft.cli.explain import essence
from lightning_peft.cli.recipes import UsageError

Named = dict[str, list[str]]


def split_named(arguments: Sequence[str], known: Iterable[str]) -> tuple[list[str], Named]:
    """Separate arguments of callbacks from those LightningCLI knows.

    Args:
        arguments: Arguments with their values.
        known: What LightningCLI's own arguments begin with, such as ``"trainer"``.

    Returns:
        LightningCLI's arguments, and the others by the callback they are for.

    Example:
        >>> split_named(["--model.lr", "0.1", "--PSKD.alpha", "0.3", "--Tent.lr=0.1"], ["model"])
        (['--model.lr', '0.1'], {'PSKD': ['--PSKD.alpha', '0.3'], 'Tent': ['--Tent.lr=0.1']})
    """
    own, rest = set(known), list[str]()
    named: Named = {}
    into = rest
    for word in arguments:
        head = re.match(r"--(\w+)\.\w", word)
        if head is not None and head[1] not in own:
            into = named.setdefault(head[1], [])
        elif word.startswith("--"):
            into = rest
        into.append(word)
    return rest, named


def apply_named(named: Named, entries: Sequence[Namespace]) -> None:
    """Set arguments of callbacks in a parsed configuration, in place.

    Args:
        named: Arguments by class name, or by the ``name`` a callback was given.
        entries: Parsed callbacks.

    Raises:
        UsageError: There is no such callback or more than one, or it does not take the argument.
    """
    for name, arguments in named.items():
        entry = _entry(name, entries)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(import_class(str(entry.class_path)), name, fail_untyped=False)
        try:
            present = parser.parse_object({name: _arguments(entry)}, defaults=True)
            entry["init_args"] = parser.parse_args(arguments, namespace=present)[name]
        except ArgumentError as error:
            raise UsageError(_refusal(name, arguments, parser, str(error.message))) from error


def _entry(name: str, entries: Sequence[Namespace]) -> Namespace:
    named = [entry for entry in entries if _arguments(entry).get("name") == name]
    found = named or [entry for entry in entries if class_name(entry) == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"--{name}: the recipe has {len(found)} callbacks of this class. Give each a name (init_args: {{name: ...}}) and "
            "use that instead, as in --my_name.argument VALUE."
        )
    names = [class_name(entry) for entry in entries]
    hint = registry.suggest(name, [*names, "trainer", "model", "data"]) if names else " It has no callbacks."
    raise UsageError(f"--{name}: the recipe has no callback {name!r}.{hint}")


def _arguments(entry: Namespace) -> dict[str, Any]:
    given = entry.get("init_args")
    return {} if given is None else dict(given.as_dict())


def _refusal(name: str, arguments: Sequence[str], parser: ArgumentParser, message: str) -> str:
    takes = [action.dest.removeprefix(f"{name}.") for action in parser._actions if action.dest.startswith(f"{name}.")]
    given = [re.split(r"[=+]", word)[0].removeprefix(f"--{name}.") for word in arguments if word.startswith(f"--{name}.")]
    for argument in given:
        if argument.split(".")[0] not in takes:
            return f"{name} has no argument {argument!r}.{registry.suggest(argument, takes)}"
    return f"{' '.join(arguments)}: {essence(message)}"

"""What the API reference reads differently from the source: examples as code, and arguments that a method inherits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

METHODS = "lightning_peft_plugins"
ENGINE = "lightning_peft"


class Docstrings(griffe.Extension):
    """Prepares every docstring of a package when it has been read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Griffe calls this once a package is complete; the bases of the methods must be known by then."""
        if pkg.name == METHODS and ENGINE not in loader.modules_collection:
            loader.load(ENGINE)
        for described in _with_docstring(pkg):
            if pkg.name == METHODS and described.is_class:
                _add_inherited_arguments(described)
            described.docstring.value = _readable(described.docstring.value)


def _with_docstring(parent: griffe.Object) -> Iterator[Any]:
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.docstring is not None:
            yield member
        yield from _with_docstring(member)


def _readable(text: str) -> str:
    # Griffe knows "Examples:" only. Without it a doctest is prose, and an output such as [(1, 8)](2) a link.
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)  # roles of Sphinx, which Markdown does not know


def _add_inherited_arguments(described: griffe.Class) -> None:
    """Append a section with the arguments that the constructor hands on to its base classes, in the words of the nearest."""
    meanings: dict[str, str] = {}
    for base in reversed(described.mro()):
        meanings |= _meanings(base)
    own = _meanings(described)
    lines = [
        f"    {item.name} ({item.annotation or 'Any'}): {' '.join(meanings[item.name].split())}{_default(item)}"
        for item in _constructor(described)
        if item.name not in own and item.name in meanings
    ]
    if lines:
        described.docstring.value += "\n\nKeyword Args:\n" + "\n".join(lines)


def _meanings(described: griffe.Class) -> dict[str, str]:
    if described.docstring is None:
        return {}
    sections = described.docstring.parse("google", warnings=False)
    parameters = (
        item for section in sections if section.kind is griffe.DocstringSectionKind.parameters for item in section.value
    )
    return {item.name: item.description for item in parameters}


def _constructor(described: griffe.Class) -> list[griffe.Parameter]:
    """Return what can be given: the class's own parameters and, as long as there is a ``**kwargs``, those of the next class."""
    found: dict[str, griffe.Parameter] = {}
    for base in [described, *described.mro()]:
        constructor = base.members.get("__init__")
        if not isinstance(constructor, griffe.Function):
            continue
        kinds = {parameter.kind for parameter in constructor.parameters}
        found = {parameter.name: parameter for parameter in constructor.parameters} | found
        if griffe.ParameterKind.var_keyword not in kinds:
            break
    return list(found.values())


def _default(parameter: griffe.Parameter) -> str:
    return "" if parameter.default is None else f" Default: `{parameter.default}`."

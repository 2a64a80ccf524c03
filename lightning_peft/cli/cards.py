"""The files that describe an installed method or merge function: card and one sentence, read without importing its package."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from lightning_peft.cli.card_heads import CardHead, parse_head, split_head
from lightning_peft.registry import MethodEntry

# A full stop that ends a sentence, and not "et al." or "e.g.".
_SENTENCE_END = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)\.\s+(?=[A-Z`*\[])")


def card_of(entry: MethodEntry) -> str:
    """Return the method's packaged card, ``cards/<Name>.md`` beside its module, without its head; empty when there is none."""
    return split_head(_card_file(entry))[1]


def head_of(entry: MethodEntry) -> CardHead:
    """Return the head of a method's card; an empty one when the card has none.

    Raises:
        ValueError: The head cannot be read.
    """
    return parse_head(split_head(_card_file(entry))[0])


def _card_file(entry: MethodEntry) -> str:
    for module in _places(entry):
        path = module.parent / "cards" / f"{entry.name}.md"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""


def summary_of(entry: MethodEntry) -> str:
    """Return one sentence on the method: the first of its card, else that of its docstring, else nothing."""
    return lead(card_of(entry)) or _docstring_summary(entry)


def missing(entry: MethodEntry) -> str:
    """Say which part of the entry point leads nowhere, or that its card cannot be read; empty when all may be there."""
    module = entry.value.partition(":")[0]
    places = _places(entry)
    if not places:
        return f"there is no package {module.partition('.')[0]}"
    on_disk = [place.parent for place in places if place.parent.is_dir()]
    if on_disk and not any(any(folder.glob(f"{module.rpartition('.')[2]}*")) for folder in on_disk):
        return f"there is no module {module}"
    try:
        head_of(entry)
    except ValueError as error:
        return f"the head of its card: {error}"
    return ""


def lead(card: str) -> str:
    r"""Return the first sentence below a card's title, as plain text; empty when a heading or a list comes first.

    Example:
        >>> lead("# Tent\n\nMoves `scale` and\nshift. One step a batch.\n\n## Source\n")
        'Moves scale and shift.'
    """
    body = re.sub(r"\A\s*# [^\n]*\n", "", card).strip()
    paragraph = body.partition("\n\n")[0]
    return "" if re.match(r"[#|>`\-*]", paragraph) else _first_sentence(paragraph)


def _first_sentence(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(text.split()))
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text).replace("`", "").replace("**", "")
    end = _SENTENCE_END.search(text)
    return text[: end.start() + 1] if end else text


def _docstring_summary(entry: MethodEntry) -> str:
    name = entry.value.partition(":")[2]
    for module in _places(entry):
        for path in (module.with_suffix(".py"), module / "__init__.py"):
            if path.is_file():
                docstring = _own_docstring(path.read_text(encoding="utf-8"), name)
                return _first_sentence(docstring.partition("\n\n")[0])
    return ""


def _own_docstring(source: str, name: str) -> str:
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return ""
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in body if isinstance(node, kinds) and node.name == name)
    return next(found, None) or ""


def _places(entry: MethodEntry) -> list[Path]:
    """Where the module may lie, without ending. Only the top-level name is asked for: a dotted one would import its parents."""
    top, *inner = entry.value.partition(":")[0].split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # a module in this process that was not loaded from anywhere
        return []
    if spec is None:
        return []
    if inner:
        return [Path(folder, *inner) for folder in spec.submodule_search_locations or ()]
    return [Path(spec.origin).with_suffix("")] if spec.origin else []

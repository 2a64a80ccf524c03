"""What a card says of arguments, names, files and its own numbers is what the code has."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import markdown
import pytest

import lightning_peft
from lightning_peft import registry
from lightning_peft.cli.card_heads import parse_head, split_head

CARDS = sorted(markdown.ROOT.glob("plugins/*/*/cards/*.md"))
CODE = re.compile(r"`([^`\n]+)`")
NUMBER = re.compile(r"\d+\.\d+")
# Words that a table may have in place of a default: the sentence beside it says what it is.
LITERAL = re.compile(r'^(None|True|False|\(\)|-?[\d.]+(e-?\d+)?|"[^"]*")$')


def body(path) -> str:
    return split_head(path.read_text())[1]


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Arguments of a method, those that its constructor hands on to a base class included; options of a merge function."""
    if name in registry.merge_functions():
        function = registry.merge_functions()[name].load()
        return {key: each for key, each in inspect.signature(function).parameters.items() if each.kind is each.KEYWORD_ONLY}
    found: dict[str, inspect.Parameter] = {}
    for base in registry.find(name).__mro__:
        own = inspect.signature(base.__init__).parameters
        found = {**own, **found}
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values()):
            break
    return found


def argument_rows(path) -> list[tuple[list[str], list[str]]]:
    """Names and defaults of the tables whose first column is `argument`."""
    rows = []
    for table in re.findall(r"^\| argument \| default \|.*\n\|[-| ]+\n((?:\|.*\n)+)", body(path), re.MULTILINE):
        for line in table.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
            rows.append((CODE.findall(cells[0]), [part.strip(" `") for part in cells[1].split(", ")]))
    return rows


def is_default(shown: str, default: Any) -> bool:
    """Whether a literal that a card shows is a default of the code; words in its place are not judged."""
    if not LITERAL.match(shown):
        return True
    return shown.strip('"') == str(default) or (shown[0].isdigit() and not isinstance(default, str) and float(shown) == default)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_head_is_complete(path) -> None:
    head = parse_head(split_head(path.read_text())[0])
    assert [field for field, value in vars(head).items() if not value] == []


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_numbers_of_the_head_stand_in_the_card(path) -> None:
    """There they are held against the evidence."""
    head = parse_head(split_head(path.read_text())[0])
    numbers = NUMBER.findall(f"{head.saves} {head.cost}")
    assert [number for number in numbers if number not in NUMBER.findall(body(path))] == []


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_arguments_of_the_tables_exist_with_these_defaults(path) -> None:
    known = parameters(path.stem)
    for names, defaults in argument_rows(path):
        assert [name for name in names if name not in known] == []
        if len(defaults) == len(names):
            shown = dict(zip(names, defaults, strict=True))
            assert [f"{name}={text}" for name, text in shown.items() if not is_default(text, known[name].default)] == []


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_arguments_given_in_a_sentence_exist_with_these_defaults(path) -> None:
    """A section of arguments that is a sentence lists them as `name=default`."""
    section = re.search(r"^## Arguments\n\n(?!\|)(.*?)(?=^## |\Z)", body(path), re.MULTILINE | re.DOTALL)
    if section is None:
        return
    known = parameters(path.stem)
    for name, shown in re.findall(r"`(\w+)=([^`]+)`", re.sub(r"\([^)]*\)", "", section[1])):
        assert name in known
        assert is_default(shown, known[name].default), f"{name}={shown}, and not {known[name].default!r}"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_calls_of_methods_have_arguments_that_exist(path) -> None:
    for name, arguments in re.findall(r"\b([A-Z]\w+)\(([^()`]*)\)", body(path)):
        if name in registry.installed():
            known = parameters(name)
            assert [key for key in re.findall(r"\b(\w+)=", arguments) if key not in known] == [], f"{name}({arguments})"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_names_of_the_library_exist(path) -> None:
    for dotted in re.findall(r"`(lightning_peft(?:\.\w+)+)", body(path)):
        assert resolves(dotted), f"there is no {dotted}"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_files_of_the_repository_exist(path) -> None:
    for name in re.findall(r"`((?:docs|tests|benchmarks|plugins)/[\w./*]+)`", body(path)):
        assert list(markdown.ROOT.glob(name)), f"there is no {name}"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_limit_is_no_promise_of_a_version(path) -> None:
    """What this library lacks is said by name, so that a test sees the day it has it."""
    text = body(path)
    assert not re.search(r"this (release|version)|not (yet )?(shipped|implemented)", text)
    for sentence in re.findall(r"[^.]*\b(?:does|is|are) not (?:contain|offer|exist)\w*[^.]*", text):
        lacking = [name for name in CODE.findall(sentence) if name in dir(lightning_peft)]
        assert lacking == [], f"{lacking} exist, against {sentence!r}"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    found: Any = lightning_peft
    for step, name in enumerate(dotted.split(".")[1:], start=2):
        try:
            found = getattr(found, name)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(dotted.split(".")[:step]))
            except ImportError:
                return False
    return True


def test_the_checks_see_what_is_wrong() -> None:
    assert resolves("lightning_peft.semi_structured")
    assert not resolves("lightning_peft.no_such_thing")
    assert is_default("0.5", 0.5)
    assert not is_default("0.5", 0.4)
    assert not is_default('"batch"', "source")
    assert "lr" in parameters("RDumb"), "from the base class"
    assert "lrr" not in parameters("RDumb")

"""A checkout of this repository: the methods that its `pyproject.toml` registers, and where their files lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lightning_peft import functional, registry
from lightning_peft.cli.card_heads import CardHead, parse_head, split_head
from lightning_peft.cli.cards import lead
from lightning_peft.cli.recipes import UsageError

PLUGINS = "lightning_peft_plugins"


@dataclass(frozen=True)
class RegisteredMethod:
    """A method as the entry points and its card present it.

    Attributes:
        name: Public name.
        value: Entry point, ``package.module:Class``.
        card: Path of the card from the root of the checkout.
        head: Head of the card.
        summary: First sentence of the card.
        title_line: Number of the line with the card's title, from 1.
    """

    name: str
    value: str
    card: Path
    head: CardHead
    summary: str
    title_line: int


@dataclass(frozen=True)
class Checkout:
    """The repository's files below ``root``."""

    root: Path

    @classmethod
    def around(cls, place: Path) -> Checkout | None:
        """Return the checkout that a folder belongs to, if any."""
        for folder in (place, *place.parents):
            if (folder / "plugins" / PLUGINS).is_dir() and (folder / "pyproject.toml").is_file():
                return cls(folder)
        return None

    @property
    def project(self) -> Path:
        """The file with the entry points."""
        return self.root / "pyproject.toml"

    def points(self, group: str = registry.GROUP) -> dict[str, str]:
        """Return the entry points of a group, in the order of the file."""
        lines = _section(self.project.read_text(encoding="utf-8"), group).splitlines()
        found = (re.fullmatch(r'(\w+) = "([\w.]+:\w+)"', line.strip()) for line in lines)
        return {match[1]: match[2] for match in found if match}

    def with_points(self, name: str, value: str, functions: dict[str, str]) -> str:
        """Return `pyproject.toml` with one more method, beside the others of its family, and its functions."""
        text = self.project.read_text(encoding="utf-8")
        text = _inserted(text, registry.GROUP, {name: value})
        return _inserted(text, functional.GROUP, functions)

    def families(self) -> list[str]:
        """Return the names of the families, which are folders of the plugins' package; that of merge functions is none."""
        folders = {path.parent.name for path in (self.root / "plugins" / PLUGINS).glob("*/__init__.py")}
        return sorted(folders - {value.split(".")[1] for value in self.points(registry.MERGES).values()})

    def methods(self) -> list[RegisteredMethod]:
        """Return all registered methods, in the order of the entry points.

        Raises:
            UsageError: A method has no card, or one whose head cannot be read or lacks a field.
        """
        return [self._method(name, value) for name, value in self.points().items()]

    def _method(self, name: str, value: str) -> RegisteredMethod:
        package, *inner = value.partition(":")[0].split(".")
        card = Path("plugins", package, *inner[:-1], "cards", f"{name}.md")
        if not (self.root / card).is_file():
            raise UsageError(f"{name} is registered in pyproject.toml but has no card. Write {card}.")
        text = (self.root / card).read_text(encoding="utf-8")
        raw, body = split_head(text)
        try:
            head = parse_head(raw)
        except ValueError as error:
            raise UsageError(f"The head of {card} cannot be read: {error}.") from error
        empty = [field for field, content in vars(head).items() if not content]
        if empty:
            raise UsageError(f"The head of {card} says nothing about {', '.join(empty)}. Fill in these fields.")
        title = text[: len(text) - len(body)].count("\n") + 1
        return RegisteredMethod(name, value, card, head, lead(body), title)


def _section(text: str, group: str) -> str:
    header = f'[project.entry-points."{group}"]\n'
    return text.partition(header)[2].partition("\n\n")[0]


def _inserted(text: str, group: str, points: dict[str, str]) -> str:
    """Put entry points behind the last one that lives in the same folder, else at the end of their group."""
    lines = _section(text, group).splitlines()
    before = "\n".join(lines)
    for name, value in points.items():
        folder = value.partition(":")[0].rpartition(".")[0]
        family = ".".join(folder.split(".")[:2])
        beside = [number for number, line in enumerate(lines) if f'"{family}.' in line]
        lines.insert(beside[-1] + 1 if beside else len(lines), f'{name} = "{value}"')
    return text.replace(before, "\n".join(lines), 1)

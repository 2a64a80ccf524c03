"""What the documentation asks its readers to type: Python blocks, command lines, and the other fenced languages."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PATTERNS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/evidence/*.md", "plugins/*/*/cards/*.md")
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
RECIPES = sorted(ROOT.glob("recipes/lightning_peft_recipes/**/*.yaml"))
FENCE = re.compile(r"^```(?P<language>\w*)(?P<title>[^\n]*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the rest of the fence's first line, its text, and the line it starts at."""

    language: str
    title: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    page = path.read_text()
    found = FENCE.finditer(page)
    return [
        Block(each["language"], each["title"].strip(), each["text"], page[: each.start()].count("\n") + 2) for each in found
    ]


def commands(path: Path, program: str) -> list[list[str]]:
    """Return the argument lists of every call of a program that a page or recipe shows, in blocks, in text and in comments.

    A comment behind two spaces is cut off, as is the explanation in a usage table; optional brackets are opened.
    """
    page = path.read_text()
    lines = re.findall(rf"^[#\s]*(?:[^`\n]*:  )?({re.escape(program)} .*)$", page, re.MULTILINE)
    inline = re.findall(rf"`({re.escape(program)} [^`]+)`", page)
    texts = [re.split(r"\s{2,}", line.strip())[0] for line in [*lines, *inline]]
    return [shlex.split(re.sub(r"[\[\]]", "", text), comments=True)[len(program.split()) :] for text in texts]


def name(path: Path) -> str:
    """Return a page's path from the root of the repository, for test ids and messages."""
    return path.relative_to(ROOT).as_posix()

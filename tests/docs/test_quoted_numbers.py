"""Every measured number in README, guides, cards and recipes stands in an evidence file, and is rounded from there."""

from __future__ import annotations

import re
from pathlib import Path

import markdown
import pytest
import yaml

EVIDENCE = markdown.ROOT / "docs" / "evidence"
TABLE = yaml.safe_load((EVIDENCE / "quoted.yaml").read_text())
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
# Looks like a measurement: has a unit or decimals.
MEASURED = re.compile(
    r"(?:\d[\d,]*(?:\.\d+)?)(?: ?%| points?\b| times\b| ms\b| minutes\b| seconds\b| GFLOP)|(?<![\d.])\d+\.\d+(?:e-?\d+)?"
)
# Elsewhere a card gives settings, and figures of papers.
MEASURED_SECTIONS = ("Cost", "Evidence", "Choosing", "Limits")
STUDIES = {
    "CIFAR-10, packaged CNN": "CIFAR-10, packaged CNN with BatchNorm",
    "CIFAR-10, small ViT": "CIFAR-10, small ViT with LayerNorm",
    "groceries, EfficientNet-Lite0": "Groceries, fine-tuned EfficientNet-Lite0 with BatchNorm",
    "IMDb to Rotten Tomatoes, MiniLM": "Reviews, MiniLM with LayerNorm: IMDb to Rotten Tomatoes",
}


def pages() -> dict[str, Path]:
    """Everything that quotes, by the name it has in the table."""
    guides = {markdown.name(path): path for path in markdown.PAGES if path.parent.name not in {"evidence", "cards"}}
    cards = {f"cards/{path.name}": path for path in markdown.PAGES if path.parent.name == "cards"}
    package = markdown.ROOT / "recipes" / "lightning_peft_recipes"
    return {**guides, **cards, **{path.relative_to(package).as_posix(): path for path in markdown.RECIPES}}


PAGES = pages()


def flat(text: str) -> str:
    """One space between words, so that quotes may run over lines and comments."""
    return " ".join(re.sub(r"^#+ ?", "", text, flags=re.MULTILINE).split())


def prose(text: str) -> str:
    """The text without code and addresses."""
    return flat(re.sub(r"`[^`]*`|(?<=\])\([^)]*\)", " ", text))


def measuring(name: str) -> str:
    """The parts of a page in which a number with a unit is taken for a measurement."""
    text = PAGES[name].read_text()
    if name.startswith("cards/"):
        parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
        text = "\n".join(body for head, body in zip(parts[1::2], parts[2::2], strict=True) if head in MEASURED_SECTIONS)
        text = re.sub(rf"^\| ({'|'.join(STUDIES)}) \|.*$", "", text, flags=re.MULTILINE)
    elif name.endswith(".yaml"):
        text = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    return flat(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


def is_rounded(quoted: str, measured: str) -> bool:
    """Whether the measured number, rounded to the digits that are quoted, is the quoted one."""
    mantissa, _, exponent = quoted.replace(",", "").partition("e")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - digits)
    return abs(float(quoted.replace(",", "")) - float(measured.replace(",", ""))) <= unit / 2 * (1 + 1e-9)


@pytest.mark.parametrize("name", TABLE["quoted"])
def test_a_quote_says_what_was_measured(name: str) -> None:
    page = flat(PAGES[name].read_text())
    for quote, file, measured in TABLE["quoted"][name]:
        assert flat(quote) in page, f"{name} no longer says {quote!r}"
        assert flat(measured) in flat((EVIDENCE / file).read_text()), f"{file} no longer says {measured!r}"
        for number in numbers(quote):
            assert any(is_rounded(number, source) for source in numbers(measured)), f"{name}: {quote!r} against {measured!r}"


@pytest.mark.parametrize("name", PAGES)
def test_every_measured_number_is_quoted_from_somewhere(name: str) -> None:
    known = [quote for quote, *_ in TABLE["quoted"].get(name, [])] + TABLE["settings"].get(name, [])
    text = prose(measuring(name))
    known_spans = [match.span() for words in known for match in re.finditer(re.escape(prose(words)), text)]
    left = [
        match[0]
        for match in MEASURED.finditer(text)
        if not any(start <= match.start() and match.end() <= end for start, end in known_spans)
    ]
    assert left == [], f"{name} quotes {left} without evidence; add a line to docs/evidence/quoted.yaml"


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("cards/")])
def test_the_tables_of_the_test_time_cards_are_those_of_the_studies(name: str) -> None:
    method = Path(name).stem
    sections = re.split(r"^## (.+)$", (EVIDENCE / "tta.md").read_text(), flags=re.MULTILINE)
    studies = dict(zip(sections[1::2], sections[2::2], strict=True))
    for row in re.findall(rf"^\| ((?:{'|'.join(STUDIES)}) \|.*) \|$", PAGES[name].read_text(), flags=re.MULTILINE):
        study, source, error, forgets = row.split(" | ")
        lines = [line.strip("| ").split(" | ") for line in studies[STUDIES[study]].splitlines() if line.startswith("| ")]
        measured = {line[0]: line for line in lines}
        assert source == measured["source"][1].split(" ±")[0]
        assert error == measured[method][1]
        assert forgets == measured[method][4].split(" ±")[0]


@pytest.mark.parametrize("name", TABLE["settings"])
def test_a_setting_stands_on_its_page(name: str) -> None:
    page = flat(PAGES[name].read_text())
    assert [words for words in TABLE["settings"][name] if flat(words) not in page] == []


def test_rounding() -> None:
    assert is_rounded("74.9", "74.89")
    assert is_rounded("7", "7.1")
    assert is_rounded("1.00", "0.998")
    assert is_rounded("3.9e-15", "3.9e-15")
    assert not is_rounded("1.18", "1.21")
    assert not is_rounded("1", "1.6")

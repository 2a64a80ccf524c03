"""What follows from the entry points and the cards' heads is what the one command writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_peft.cli.authors import generate
from lightning_peft.cli.authors.checkout import Checkout
from lightning_peft.cli.recipes import UsageError

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("README.md", "pyproject.toml", "docs", "lightning_peft/__init__.py", "lightning_peft/__init__.pyi")
TENT = "plugins/lightning_peft_plugins/test_time/cards/Tent.md"


@pytest.fixture
def copy(tmp_path) -> Checkout:
    """The files that the command reads and writes."""
    for name in (*SOURCES, "plugins/lightning_peft_plugins"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.json"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return Checkout(tmp_path)


def change(checkout: Checkout, name: str, old: str, new: str) -> None:
    text = (checkout.root / name).read_text()
    assert old in text
    (checkout.root / name).write_text(text.replace(old, new, 1))


def test_nothing_that_is_generated_is_stale() -> None:
    assert generate.stale(Checkout(ROOT)) == [], f"run {generate.COMMAND}"


EDITS = [
    ("pyproject.toml", 'Tent = "', 'Tent2 = "', "has no card"),
    (TENT, "paper: Wang et al. 2021", "paper: Wang et al. 2022", ["README.md", "docs/methods/Tent.md"]),
    (TENT, "Minimises prediction entropy", "Minimises entropy", ["README.md", "docs/index.md"]),
    (TENT, "goals: [robust at test time]", "goals: [smaller]", ["README.md", "docs/index.md", "docs/methods/Tent.md"]),
    ("README.md", "| [`Tent`](", "| [`Tint`](", ["README.md"]),
    ("lightning_peft/__init__.py", '"bake": ', '"bake2": ', ["lightning_peft/__init__.pyi"]),
    ("docs/methods/Tent.md", "## API", "## Api", ["docs/methods/Tent.md"]),
    (TENT, "goals: [robust at test time]", "goals: [cheap]", "goals must be a list of smaller"),
    (TENT, "cost: one", "price: one", "unknown fields price"),
    (TENT, "cost: one backward pass a batch\n", "", "says nothing about cost"),
    ("README.md", "<!-- end -->", "", "README.md has no place"),
]


@pytest.mark.parametrize(("name", "old", "new", "result"), EDITS, ids=[edit[2] or "removed" for edit in EDITS])
def test_a_change_is_noticed_and_written(copy, name, old, new, result) -> None:
    change(copy, name, old, new)
    if isinstance(result, str):
        with pytest.raises(UsageError, match=result):
            generate.stale(copy)
        return
    assert {path.as_posix() for path in generate.stale(copy)} == set(result)
    assert {path.as_posix() for path in generate.write(copy)} == set(result)
    assert generate.stale(copy) == []


def test_the_page_of_a_method_that_is_gone_goes_too(copy) -> None:
    line = next(line for line in copy.project.read_text().splitlines() if line.startswith("Tent = "))
    change(copy, "pyproject.toml", f"{line}\n", "")
    assert Path("docs/methods/Tent.md") in generate.write(copy)
    assert not (copy.root / "docs/methods/Tent.md").exists()
    assert "Tent.md" not in (copy.root / "README.md").read_text()
    assert generate.stale(copy) == []


def test_the_check_of_the_command_fails_and_writes_nothing(copy, monkeypatch, capsys) -> None:
    monkeypatch.chdir(copy.root / "docs")
    assert generate.main(["--check"]) == 0
    change(copy, "docs/methods/Tent.md", "## API", "## Api")
    assert generate.main(["--check"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "stale docs/methods/Tent.md\n"
    assert "make generate" in shown.err
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_outside_of_a_checkout_it_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main([]) == 2
    assert "not a checkout" in capsys.readouterr().err

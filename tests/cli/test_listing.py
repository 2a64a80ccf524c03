"""`list`: readable at 80 columns, and made from files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from lightning_peft import registry
from lightning_peft.cli import cards, listing
from lightning_peft.cli.recipes import packaged

OURS = {name: entry for name, entry in registry.installed().items() if entry.distribution == "lightning-peft"}
WIDTH = max(map(len, OURS))
SCRIPT = """
import sys, time
from lightning_peft.cli.main import main
status = main(["list", *sys.argv[1:]])
heavy = {"torch", "lightning", "transformers", "numpy", "lightning_peft_plugins", "lightning_peft_recipes", "their_plugin"}
print(status, time.process_time(), *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""

# Raises when it is imported, or what it imports is not there: nothing of it may run to be listed.
THEIR_PACKAGE = "raise SystemExit('imported')\n"
THEIR_METHOD = """
import no_such_framework

class Theirs(no_such_framework.Method):
    \"\"\"Does :class:`~their_plugin.x.Something` in ``one`` go, as Li et al. Said it. Then more.

    Args:
        x: A number.
    \"\"\"
"""


def text(width: int = 80) -> list[str]:
    """The lines of `list` on a terminal of this width."""
    console = Console(width=width, file=StringIO(), color_system=None)
    listing.list_all().show(console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def run(*arguments: str, path: str) -> tuple[str, float, list[str]]:
    """Run `list` in a new interpreter; return what it printed, its seconds of CPU, and the heavy packages that it imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    status, seconds, *heavy = done.stderr.split()
    assert (done.returncode, status) == (0, "0"), done.stderr
    return done.stdout, float(seconds), heavy


@pytest.fixture
def their_site(tmp_path):
    """A folder with a package as pip leaves it: no card, and code that cannot be imported."""
    package, info = tmp_path / "their_plugin", tmp_path / "their_plugin-1.2.3.dist-info"
    (package / "inner").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(THEIR_PACKAGE)
    (package / "inner" / "method.py").write_text(THEIR_METHOD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.2.3\n")
    points = ["Theirs = their_plugin.inner.method:Theirs", "Gone = their_plugin.inner.gone:Gone"]
    (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *points]))
    return tmp_path


def test_it_imports_nothing_heavy_and_no_plugin(their_site) -> None:
    printed, seconds, heavy = run("--json", path=str(their_site))
    assert heavy == []
    assert seconds < 1.5, "importing torch alone takes longer"
    found = {item["name"]: item for item in json.loads(printed)["methods"]}
    assert found["Theirs"]["summary"] == "Does Something in one go, as Li et al. Said it."
    assert (found["Theirs"]["package"], found["Theirs"]["error"]) == ("their-plugin 1.2.3", "")
    assert found["Gone"]["error"] == "there is no module their_plugin.inner.gone"


def test_every_method_is_one_line_of_80_columns() -> None:
    lines = text()
    assert max(map(len, lines)) <= 80
    for name, entry in OURS.items():
        summary = cards.summary_of(entry)
        assert summary.endswith("."), name
        assert f"{name:<{WIDTH}} {summary}" in lines


def test_no_name_of_a_recipe_is_broken() -> None:
    lines = text()
    for name, recipe in packaged().items():
        assert any(line.startswith(f"{name}  {recipe.command}") for line in lines), name
        assert f"{recipe.minutes} min, {', '.join(recipe.needs)}" in "\n".join(lines)
    assert " ".join(packaged()["quickstart"].summary.split()) in " ".join(" ".join(lines).split())


def test_list_as_data(cli) -> None:
    status, data, _ = cli("list", "--json")
    assert status == 0
    methods = {item["name"]: item for item in data["methods"]}
    assert methods["NMSparsity"]["family"] == "sparsity"
    assert methods["NMSparsity"]["package"].startswith("lightning-peft ")
    assert {"quickstart", "language/nm_minilm_reviews"} <= {item["name"] for item in data["recipes"]}


def test_a_broken_plugin_is_listed_as_broken_and_stops_nobody(cli, monkeypatch) -> None:
    broken = registry.MethodEntry("Broken", "no_such_package.family.module:Broken", "third-party", "1.0")
    entries = {**registry.installed(), "Broken": broken}
    monkeypatch.setattr(registry, "installed", lambda: entries)
    status, data, _ = cli("list", "--json")
    assert status == 0
    found = {item["name"]: item for item in data["methods"]}
    assert found["Broken"]["error"] == "there is no package no_such_package"
    assert found["NMSparsity"]["error"] == ""
    lines = text()
    assert "third-party 1.0" in lines
    assert any(line.startswith(f"{'Broken':<{WIDTH}} broken: there is no package") for line in lines)
    status, _, error = cli("show", "Broken")
    assert status == 2
    assert "third-party 1.0" in error


@pytest.mark.parametrize(
    ("card", "sentence"),
    [
        ("# A\n\nOne [link](b.md) and `code`,\ngoes on. Two.\n", "One link and code, goes on."),
        ("# A\n\nVersion 2.4 by Sun et al. New here. Two.", "Version 2.4 by Sun et al. New here."),
        ("# A\n\n## Source\n\nA paper.\n", ""),
        ("# A\n\n- a list\n", ""),
        ("# A\n", ""),
        ("", ""),
    ],
)
def test_the_first_sentence_of_a_card(card: str, sentence: str) -> None:
    assert cards.lead(card) == sentence


def test_a_method_without_card_or_docstring_is_listed(tmp_path, monkeypatch) -> None:
    for source in ("class Bare: pass", "class (", ""):
        (tmp_path / "bare_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        entry = registry.MethodEntry("Bare", "bare_plugin:Bare", "bare", "0")
        assert (cards.summary_of(entry), cards.missing(entry)) == ("", "")


def names_for(cli, wishes: str) -> set[str]:
    status, data, _ = cli("list", "--for", wishes, "--json")
    assert status == 0
    return {item["name"] for item in data["methods"]}


def test_methods_for_a_goal_are_those_whose_cards_name_it(cli) -> None:
    named = {name for name, entry in OURS.items() if "faster inference" in cards.head_of(entry).goals}
    assert {"StructuredPruning", "FTWT"} <= named
    assert names_for(cli, "Faster  inference") == named
    assert "PSKD" not in named


def test_several_wishes_must_all_be_met(cli) -> None:
    assert "Tent" in names_for(cli, "vision, robust at test time"), "any data includes images"
    assert "DeYO" not in names_for(cli, "language, robust at test time")
    assert names_for(cli, "robust at test time, augment") == {"CMF", "CoTTA", "RoTTA", "MEMO", "ROID"}


def test_a_wish_that_no_method_serves_names_what_can_be_asked_for(cli) -> None:
    status, _, error = cli("list", "--for", "faster inferense")
    assert status == 2
    assert "Goals: smaller, faster inference" in error
    wish = error.split("Goals: ")[1].split(", ")[1]
    assert names_for(cli, wish)


def test_the_methods_of_a_wish_are_shown_with_their_costs(cli) -> None:
    status, shown, _ = cli("list", "--for", "better accuracy")
    assert status == 0
    assert "PSKD  Softens targets" in shown
    assert "cost: 1.00 times a plain training step" in " ".join(shown.split())


HEAD = "---\ngoals: [smaller]\ncost: none\n---\n"


@pytest.mark.parametrize(
    ("card", "error"),
    [
        ("# Theirs\n\nTheirs.\n", ""),
        (f"{HEAD}# Theirs\n\nTheirs.\n", ""),
        (HEAD.replace("smaller", "tiny") + "# Theirs\n", "the head of its card: goals must be a list of smaller"),
        (HEAD.replace("none", "[1]") + "# Theirs\n", "the head of its card: cost must be text"),
        (HEAD.replace("none", "{") + "# Theirs\n", "the head of its card: not YAML"),
        ("---\n- a\n---\n# Theirs\n", "the head of its card: not a mapping"),
    ],
)
def test_somebody_elses_card_with_and_without_a_head(cli, their_site, monkeypatch, card: str, error: str) -> None:
    (their_site / "their_plugin" / "inner" / "cards").mkdir()
    (their_site / "their_plugin" / "inner" / "cards" / "Theirs.md").write_text(card)
    monkeypatch.syspath_prepend(their_site)
    entry = registry.MethodEntry("Theirs", "their_plugin.inner.method:Theirs", "their-plugin", "1.2.3")
    monkeypatch.setattr(registry, "installed", lambda: {"Theirs": entry})
    monkeypatch.setattr(registry, "merge_functions", dict)
    status, data, _ = cli("list", "--json")
    assert status == 0
    assert data["methods"][0]["error"].startswith(error)
    assert bool(data["methods"][0]["error"]) == bool(error)
    if error:
        assert cli("list", "--for", "smaller")[0] == 2
    elif card.startswith("---"):
        assert names_for(cli, "smaller") == {"Theirs"}
        assert cards.card_of(entry).startswith("# Theirs")


def test_the_card_is_shown_without_its_head_and_with_its_fields(cli) -> None:
    status, shown, _ = cli("show", "Tent")
    assert status == 0
    assert "goals: robust at test time" in shown
    assert "licence: MIT" in shown
    assert "---" not in shown

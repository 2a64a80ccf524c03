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
        assert f"{name:<18}  {summary}" in lines


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
    assert any(line.startswith("Broken              broken: there is no package") for line in lines)
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

"""`lightning-peft new` outside of this repository, and its errors; inside, tests/test_contributing.py walks it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from warm_python import python

from lightning_peft.cli.authors.checkout import Checkout
from lightning_peft.cli.authors.kinds.table import KINDS
from lightning_peft.cli.main import build_parser
from lightning_peft.contract import snake_case

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    """What the command reads and changes in a checkout."""
    for name in ("README.md", "pyproject.toml", "docs/index.md", "lightning_peft/__init__.py", "tests/pairs/pairs.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    plugins = "plugins/lightning_peft_plugins"
    shutil.copytree(ROOT / plugins, tmp_path / plugins, ignore=shutil.ignore_patterns("__pycache__"))
    return Checkout(tmp_path)


def snapshot(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_elsewhere_it_writes_a_package(cli, tmp_path) -> None:
    status, data, _ = cli("new", "SquaredLogits", "--json")
    assert status == 0
    folder = tmp_path / "peft_squared_logits"
    assert {path.relative_to(tmp_path).as_posix() for path in folder.rglob("*") if path.is_file()} == set(data["files"])
    assert 'SquaredLogits = "peft_squared_logits.squared_logits:SquaredLogits"' in (folder / "pyproject.toml").read_text()


# Of the contract only what tells kinds apart: what is trained, saved and left behind. All of it takes a minute for each kind.
OF_THE_CONTRACT = ("test_trains", "test_resumes_from_every_epoch", "test_bake_equals_training", "test_checkpoint_loads_baked")


@pytest.mark.slow
def test_packages_of_every_kind_pass_their_tests(cli, tmp_path) -> None:
    for kind in KINDS:
        assert cli("new", named(kind), "--kind", kind)[0] == 0
    folders = [tmp_path / f"peft_{snake_case(named(kind))}" for kind in KINDS]
    chosen = " or ".join((*OF_THE_CONTRACT, "formula", "merged", "functional"))
    run = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", *map(str, folders)]
    environment = {"PYTHONPATH": ":".join([*map(str, folders), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = python(*run, "-k", chosen, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed[1]) > len(KINDS) * (2 + len(OF_THE_CONTRACT)), "formula, doctest and contract of every kind"


def named(kind: str) -> str:
    """Name of a method that says its kind."""
    return f"Some{kind.title().replace('-', '')}"


def test_the_help_names_every_kind(capsys) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["new", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert [kind for kind in KINDS if kind not in shown.replace("- ", "-")] == []


def test_a_method_stands_beside_its_family_and_is_drawn_into_everything(cli, checkout, monkeypatch) -> None:
    monkeypatch.chdir(checkout.root / "docs")
    before = list(checkout.points())
    status, data, error = cli("new", "SquaredLogits", "--family", "regularizers", "--json")
    assert status == 0, error
    after = list(checkout.points())
    assert after.index("SquaredLogits") == before.index("WeightCompander") + 1, "behind the last of its family"
    assert [name for name in after if name != "SquaredLogits"] == before
    assert checkout.points("lightning_peft.functional")["squared_logits"].endswith("functional.squared_logits:squared_logits")
    pairs = (checkout.root / "tests/pairs/pairs.py").read_text()
    assert '    "SquaredLogits": peft.SquaredLogits,\n    "StageSharing"' in pairs
    assert {"lightning_peft/__init__.pyi", "README.md", "docs/index.md", "docs/methods/SquaredLogits.md"} <= set(data["files"])


def test_a_new_family_is_a_package(cli, checkout, monkeypatch) -> None:
    monkeypatch.chdir(checkout.root)
    assert cli("new", "SquaredLogits", "--family", "low_rank")[0] == 0
    assert "low_rank" in checkout.families()
    for package in ("low_rank", "low_rank/functional"):
        assert (checkout.root / "plugins/lightning_peft_plugins" / package / "__init__.py").read_text().startswith('"""')
    assert list(checkout.points())[-1] == "SquaredLogits"


REJECTED = [
    (["SquaredLogits", "--kind", "loss", "--family", "growth"], "Choose --kind from loss-term, weight-map"),
    (["squared", "--family", "growth"], "Write it like ConfidencePenalty"),
    (["TestedLogits", "--family", "growth"], "pytest would take TestedLogits"),
    (["SquaredLogitsOfEveryKind", "--family", "growth"], "has room for 18"),
    (["Tent", "--family", "growth"], "There is a Tent already"),
    (["SoftmaxEntropy", "--family", "growth"], "There is a softmax_entropy already"),
    (["SquaredLogits"], "one of deltas, growth, pruning"),
    (["SquaredLogits", "--family", "../x"], "one of deltas, growth, pruning"),
]


@pytest.mark.parametrize(("arguments", "message"), REJECTED, ids=lambda value: value if isinstance(value, str) else None)
def test_what_cannot_be_made_changes_nothing(cli, checkout, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(checkout.root)
    before = snapshot(checkout.root)
    status, _, error = cli("new", *arguments)
    assert status == 2
    assert message in error
    assert snapshot(checkout.root) == before


def test_nothing_is_written_over(cli, checkout, monkeypatch) -> None:
    monkeypatch.chdir(checkout.root)
    (checkout.root / "tests/plugins").mkdir()
    (checkout.root / "tests/plugins/test_squared_logits.py").write_text("mine")
    before = snapshot(checkout.root)
    status, _, error = cli("new", "SquaredLogits", "--family", "growth")
    assert status == 2
    assert "test_squared_logits.py exists already" in error
    assert snapshot(checkout.root) == before

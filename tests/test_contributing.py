"""CONTRIBUTING.md as a contributor walks it, in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from warm_python import python

from lightning_peft.cli.authors.kinds.table import KINDS
from lightning_peft.cli.authors.new import LONGEST_NAME
from lightning_peft.contract import snake_case

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r'^```\w+ title="(?P<name>[^"]+)"\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
NAME, SNAKE = "ConfidencePenalty", "confidence_penalty"
FAMILY = "plugins/lightning_peft_plugins/regularizers"
TEST, METHOD, FUNCTIONS = f"tests/plugins/test_{SNAKE}.py", f"{FAMILY}/{SNAKE}.py", f"{FAMILY}/functional/{SNAKE}.py"
FOLDERS = (".ci", "lightning_peft", "plugins", "recipes", "docs", "tests")
COPIED = (*FOLDERS, "README.md", "CONTRIBUTING.md", "pyproject.toml", "LICENSE")
# A method of every other kind; names are as long as they may be, for the sake of the lines in which they stand.
OTHERS = {kind: f"Some{kind.title().replace('-', '')}Method"[:LONGEST_NAME] for kind in KINDS if kind != "loss-term"}
# Every test that looks at methods as such; those of this file would copy the copy.
LOOKS_AT_METHODS = [
    "tests/test_api.py::test_the_stub_lists_what_dir_offers",
    "tests/test_arrows.py::test_a_family_lists_its_methods_and_nothing_beside",
    "tests/test_arrows.py::test_functions_that_plugins_offer_stand_in_a_folder_functional",
    "tests/docs/test_pages.py",
    "tests/docs/test_generated.py::test_nothing_that_is_generated_is_stale",
    "tests/cli/test_listing.py::test_every_method_is_one_line_of_80_columns",
    "tests/pairs/test_pairs.py::test_every_registered_method_is_here",
]
LOOKS_AT_ONE = [
    "tests/test_api.py::test_every_public_name_resolves[{name}]",
    "tests/docs/test_quoted_numbers.py::test_every_measured_number_is_quoted_from_somewhere[cards/{name}.md]",
    "tests/docs/test_cards.py::test_arguments_of_the_tables_exist_with_these_defaults[{name}]",
    "tests/pairs/test_pairs.py::test_alone[{name}]",
]


class Walk:
    """A copy of the repository, and the commands of the page in it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site = folder / "repository", folder / "site"
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, self.root / name)

    def python(self, *arguments: str) -> str:
        path = os.pathsep.join(map(str, (self.site, self.root, self.root / "plugins", self.root / "recipes")))
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        done = python(*arguments, cwd=self.root, env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def install(self) -> None:
        """Do what `pip install -e .` does with the entry points: build the editable wheel and unpack its metadata."""
        shutil.rmtree(self.site, ignore_errors=True)
        self.site.mkdir()
        build = "import sys, hatchling.build as b; print(b.build_editable(sys.argv[1]))"
        wheel = self.python("-c", build, str(self.site)).splitlines()[-1]
        with zipfile.ZipFile(self.site / wheel) as archive:
            archive.extractall(self.site)

    def test(self, *names: str) -> int:
        """Run tests and return how many passed."""
        already = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # a plugin of another package
        output = self.python("-m", "pytest", "-p", "no:cacheprovider", "-W", already, *names)
        passed = re.search(r"(\d+) passed", output.strip().splitlines()[-1])
        assert passed is not None, output
        return int(passed[1])

    def make(self, target: str) -> None:
        """Do what the Makefile does for a target."""
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for line in recipe[1].splitlines():
            self.python(*line.partition("$(BIN)/python ")[2].split())

    def ruff(self, *arguments: str) -> None:
        ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if ruff is None:
            pytest.skip("ruff is not installed; make lint installs it")
        done = subprocess.run([ruff, *arguments], cwd=self.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    """The copy after the page's first step, and with one more method of every other kind, as they are written."""
    pytest.importorskip("hatchling", reason="builds the package, as pip does; make test installs it")
    walk = Walk(tmp_path_factory.mktemp("contributing"))
    command = re.search(r"^lightning-peft (new .*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    walk.python("-m", "lightning_peft.cli.main", *command[1].split())
    commands = [["new", name, "--kind", kind, "--family", "some_family"] for kind, name in OTHERS.items()]
    walk.python("-c", f"from lightning_peft.cli.main import main; assert not any(map(main, {commands}))")
    walk.install()
    return walk


@pytest.fixture(scope="module")
def written(walk) -> Walk:
    """The copy with the files of the page in place of those that were generated, and its last commands given."""
    blocks = list(BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text()))
    assert {FUNCTIONS, METHOD, TEST, "use.py"} == {block["name"] for block in blocks}
    for block in blocks:
        assert (walk.root / block["name"]).exists() == (block["name"] != "use.py"), "the page replaces what new wrote"
        (walk.root / block["name"]).write_text(block["text"])
    card = walk.root / FAMILY / "cards" / f"{NAME}.md"
    placeholder = "Say in one sentence, of 60 characters, what it does."
    card.write_text(card.read_text().replace(placeholder, "Rewards unsure predictions."))
    record = walk.root / "tests/pairs/rejected.json"
    stored = json.loads(record.read_text())
    stored["methods"] += OTHERS.values()  # as if trained: the page writes one method, so one method's pairs are waited for
    record.write_text(json.dumps(stored))
    walk.make("generate")
    assert "| Rewards unsure predictions. |" in (walk.root / "README.md").read_text()
    return walk


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_method_of_any_kind_is_green_before_its_author_writes_a_line(walk) -> None:
    """Its whole contract takes a minute, so only its mathematics, and what it must do whatever the kind."""
    names = [NAME, *OTHERS.values()]
    checks = [*LOOKS_AT_METHODS, *(check.format(name=name) for check in LOOKS_AT_ONE for name in names)]
    own = [f"tests/plugins/test_{snake_case(name)}.py" for name in names]
    contracts = " or ".join(f"Test{name}" for name in names)
    assert walk.test(*checks, *own, FUNCTIONS, "-k", f"not ({contracts})") > len(checks)
    walk.ruff("check", ".")
    walk.ruff("format", "--check", ".")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tests_of_the_example_pass(written) -> None:
    pairs = "tests/pairs/test_pairs.py"
    derived = [
        "tests/docs/test_generated.py::test_nothing_that_is_generated_is_stale",
        f"{pairs}::test_the_page_tells_what_is_on_record",
        f"{pairs}::test_every_method_is_on_record",
        f"{pairs}::test_pair[{NAME}+Tent]",
    ]
    assert written.test(TEST, METHOD, FUNCTIONS, *derived) > 20, "the example runs the whole contract"


def test_the_example_is_used_by_name(written) -> None:
    assert f"peft/loss/{SNAKE}" in written.python("use.py")
    assert "Rewards unsure predictions." in written.python("-m", "lightning_peft.cli.main", "list")


def test_the_example_is_in_our_style(written) -> None:
    written.ruff("check", METHOD, FUNCTIONS, TEST)
    written.ruff("format", "--check", METHOD, FUNCTIONS, TEST)

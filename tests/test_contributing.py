from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r'^```\w+ title="(?P<name>[^"]+)"\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
FILES = ["tests/plugins/test_confidence_penalty.py", "plugins/lightning_peft_plugins/regularizers/confidence_penalty.py"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The plugins of this repository with the method of CONTRIBUTING.md among them, registered as it says."""
    folder = tmp_path_factory.mktemp("contributing")
    plugins = Path(find_spec("lightning_peft_plugins").origin).parent
    shutil.copytree(plugins, folder / "plugins" / plugins.name, ignore=shutil.ignore_patterns("__pycache__"))
    for block in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text()):
        path = folder / block["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block["text"])
    # What an installation makes of the entry points of a pyproject.toml.
    header, *points = (folder / "pyproject.toml").read_text().splitlines()
    assert header == '[project.entry-points."lightning_peft.plugins"]'
    installed = folder / "plugins" / "contributed-0.0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: contributed\nVersion: 0.0.1\n")
    (installed / "entry_points.txt").write_text("\n".join(["[lightning_peft.plugins]", *points]).replace('"', ""))
    (folder / "pyproject.toml").unlink()
    shutil.copy(ROOT / "pyproject.toml", folder / "pyproject.toml")  # warnings are errors, as for every test here
    return folder


def python(project: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(project / "plugins"), "OMP_NUM_THREADS": "1"}
    for key in [key for key in environment if key.startswith("PYTEST_")]:
        del environment[key]
    done = subprocess.run([sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tests_of_the_example_pass(project: Path) -> None:
    output = python(project, "-m", "pytest", "-p", "no:cacheprovider", *FILES)
    passed = re.search(r"(\d+) passed", output.strip().splitlines()[-1])
    assert passed is not None, output
    assert int(passed[1]) > 20, "the example runs the whole contract"


def test_the_example_is_used_by_name(project: Path) -> None:
    output = python(project, "use.py")
    assert "peft/loss/confidence_penalty" in output


@pytest.mark.parametrize("tool", [["check"], ["format", "--check"]])
def test_the_example_is_in_our_style(project: Path, tool: list[str]) -> None:
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if ruff is None:
        pytest.skip("ruff is not installed; make lint installs it")
    done = subprocess.run([ruff, *tool, *FILES], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

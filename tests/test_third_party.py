from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from warm_python import python

PLUGIN = Path(__file__).parent / "fixtures" / "third_party_plugin"

TRAINING = """
import json
import lightning_peft
before = [name for name in __import__("sys").modules if name.startswith("peft_flooding")]
from lightning_peft import Flooding, WeightCompander, bake, plan
from lightning_peft.testing import Plain, loader, trainer

callbacks = [WeightCompander(), Flooding(level=5.0)]
module = Plain("sgd")
table = str(plan(module, callbacks))
logged = []

class Log(lightning_peft.Method):
    lane = lightning_peft.Lane.REPORT
    def after_step(self, run):
        logged.append({key: float(value) for key, value in run.trainer.callback_metrics.items()})

runner = trainer(callbacks=[*callbacks, Log()], max_epochs=6, log_every_n_steps=1)
runner.fit(module, loader())
runner.save_checkpoint("flooded.ckpt")
resumed = trainer(callbacks=[WeightCompander(), Flooding(level=5.0), Log()], max_epochs=7)
resumed.fit(Plain("sgd"), loader(), ckpt_path="flooded.ckpt", weights_only=True)
print(json.dumps({
    "before": before, "plan": table, "logged": logged[1:24], "steps": resumed.global_step,
    "names": sorted(lightning_peft.load_from_checkpoint(Plain, "flooded.ckpt").state_dict()),
}))
"""


def run(*arguments: str, path: Path | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return python(*arguments, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed somebody else's package, without asking any index."""
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(PLUGIN, folder / "source")
    pip = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = run(*pip, "--target", str(folder / "site"), str(folder / "source"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_a_user_composes_it(installed: Path, tmp_path: Path) -> None:
    done = run("-c", TRAINING, path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] == [], "imported before anybody asked for it"
    assert "LOSS     flooding" in found["plan"]
    for logged in found["logged"]:
        # |loss - level| + level, where the loss is below the level
        assert logged["peft/loss/total"] == pytest.approx(10.0 - logged["peft/loss/base"], abs=1e-5)
    losses = [logged["peft/loss/base"] for logged in found["logged"]]
    assert sum(losses[-4:]) > sum(losses[:4]), "below the level, training climbs"
    assert found["steps"] == 28
    assert found["names"] == sorted(f"model.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias"))


def test_the_command_line_lists_it(installed: Path, tmp_path: Path) -> None:
    done = run("-m", "lightning_peft.cli.main", "list", "--json", path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "peft-flooding" in done.stdout
    assert '"Flooding"' in done.stdout

"""`run`: baseline and composed, files, resume, errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from cli_toys import ToyModule
from lightning.pytorch.cli import LightningCLI
from warm_python import python

FILES = {"report.html", "report.md", "report.json", "model.ckpt", "baked.ckpt", "curves.png", "losses.png", "reliability.png"}


def test_run_writes_everything_and_prints_one_json_document(cli, toy, tmp_path) -> None:
    out = tmp_path / "out"
    status, data, _ = cli("run", toy, "--out", out, "--json", "--trainer.max_epochs", "2")
    assert status == 0
    assert {path.name for path in out.iterdir()} >= FILES
    written = json.loads((out / "report.json").read_text())
    assert all(data[key] == written[key] for key in ("recipe", "dense", "composed", "weights", "nm_proof"))
    assert [method["method"] for method in data["composed"]["methods"]] == ["ToyMask", "ToyTerm"]
    assert data["dense"]["methods"] == []
    assert data["composed"]["steps"] == data["dense"]["steps"] == 8
    assert data["dense"]["nonzero"] == data["dense"]["parameters"]
    kept = {layer["name"]: layer["density"] for layer in data["weights"]["layers"]}
    assert kept == {"model.0.weight": 0.5, "model.2.weight": 0.5}
    assert sum(share for *_, share in data["composed"]["calibration"]) == pytest.approx(1)


def test_the_baked_checkpoint_is_an_ordinary_one_with_the_reported_accuracy(cli, toy, tmp_path) -> None:
    from cli_toys import ToyData

    _, data, _ = cli("run", toy, "--out", tmp_path / "out", "--json", "--no-baseline")
    module = ToyModule.load_from_checkpoint(tmp_path / "out" / "baked.ckpt", weights_only=True).eval()
    inputs, labels = ToyData().data.tensors
    with torch.no_grad():
        accuracy = (module.model(inputs).argmax(-1) == labels).float().mean().item()
    assert accuracy == pytest.approx(data["composed"]["metrics"]["test/accuracy"], abs=1e-6)
    assert "dense" not in data


def test_the_baseline_is_the_recipe_without_its_methods_only(cli, toy, tmp_path) -> None:
    plain = tmp_path / "plain.yaml"
    methods = ("    - class_path: cli_toys.ToyMask\n", "    - class_path: cli_toys.ToyTerm\n      init_args: {weight: 0.2}\n")
    text = toy.read_text()
    for lines in methods:
        assert lines in text
        text = text.replace(lines, "")
    plain.write_text(text)
    _, both, _ = cli("run", toy, "--out", tmp_path / "a", "--json")
    _, alone, _ = cli("run", plain, "--out", tmp_path / "b", "--json")
    assert alone["composed"]["methods"] == []
    assert both["dense"]["metrics"] == alone["composed"]["metrics"]
    assert both["dense"]["metrics"] != both["composed"]["metrics"]


def test_a_killed_run_resumes_bit_exactly_and_skips_what_is_finished(cli, toy, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cli("run", toy, "--out", whole)
    command = ["-m", "lightning_peft.cli.main", "run", str(toy), "--out", str(killed), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    died = python(*command, env={**environment, "TOY_KILL_AT": "7"}, cwd=tmp_path)
    assert died.returncode == -9
    assert not (killed / "composed" / "trial.json").exists()
    before = (killed / "dense" / "trial.json").stat().st_mtime_ns
    resumed = python(*command, "--resume", env=environment, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    data = json.loads(resumed.stdout)
    assert (killed / "dense" / "trial.json").stat().st_mtime_ns == before
    states = [torch.load(folder / "baked.ckpt", weights_only=True)["state_dict"] for folder in (whole, killed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert data["composed"]["metrics"] == json.loads((whole / "report.json").read_text())["composed"]["metrics"]
    assert data["composed"]["flops"] == json.loads((whole / "report.json").read_text())["composed"]["flops"] > 0
    # The curve has the steps of both sessions, each once.
    from lightning_peft.report.curves import read_curves

    steps = [point.step for point in read_curves(killed / "composed" / "curves")["train/loss"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 11


def test_a_folder_in_use_is_not_overwritten_nor_continued_with_other_settings(cli, toy, tmp_path) -> None:
    out = tmp_path / "out"
    assert cli("run", toy, "--out", out, "--no-baseline")[0] == 0
    status, _, error = cli("run", toy, "--out", out, "--no-baseline")
    assert status == 2
    assert "--resume" in error
    status, _, error = cli("run", toy, "--out", out, "--no-baseline", "--resume", "--model.lr", "0.3")
    assert status == 2
    assert "lr: 0.3" in error


def test_default_folders_are_numbered_and_the_latest_is_resumed(cli, toy, tmp_path) -> None:
    for _ in range(2):
        assert cli("run", toy, "--no-baseline", "--trainer.max_epochs", "1")[0] == 0
    _, data, _ = cli("run", toy, "--no-baseline", "--trainer.max_epochs", "1", "--resume", "--json")
    assert data["out"] == str(Path("runs") / "toy-2")
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstrat"], "Did you mean quickstart"),
        (["no/such/file.yaml"], "There is no file"),
        (["toy.yaml", "--model.widht", "3"], "widht"),
        (["toy.yaml", "--trainer.max_epochs", "many"], "max_epochs"),
        (["toy.yaml", "--resume"], "to resume"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(cli, toy, arguments, message) -> None:
    status, out, error = cli("run", *arguments)
    assert (status, out) == (2, "")
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_traceback_on_request(cli) -> None:
    assert "Traceback" in cli("run", "quickstrat", "--traceback")[2]


def test_a_missing_extra_names_the_pip_command(cli, toy, monkeypatch) -> None:
    import lightning_peft.cli.recipes as recipes

    toy.write_text(toy.read_text().replace("minutes: 0.1", "needs: [vision]"))
    monkeypatch.setitem(recipes.EXTRAS, "vision", ("a_module_nobody_has",))
    status, _, error = cli("run", toy)
    assert status == 2
    assert 'pip install "lightning-peft[vision]"' in error


@pytest.mark.filterwarnings(
    r"ignore:\s*By default only one Jsonargparse:DeprecationWarning", r"ignore:[\s\S]*was deprecated in v4:DeprecationWarning"
)
def test_a_recipe_is_a_plain_lightning_cli_file(toy, monkeypatch) -> None:
    arguments = ["fit", "--config", str(toy), "--trainer.max_epochs", "1", "--trainer.logger", "false"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert LightningCLI(save_config_callback=None).trainer.global_step == 4

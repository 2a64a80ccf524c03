"""Runs with what Lightning's users have in their Trainer, and files that load by the lines that are printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loading_lines import loaded
from warm_python import python

from lightning_peft.cli.folders import held

ORDINARY = """\
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 6
  log_every_n_steps: 1
  default_root_dir: theirs
  enable_checkpointing: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: theirs, name: logged}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val/accuracy, mode: max, dirpath: theirs/best}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_last: true, every_n_epochs: 1}
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val/accuracy, mode: max, patience: 1, min_delta: 1.0}
    - class_path: cli_toys.ToyMask
model:
  class_path: cli_toys.ToyModule
data:
  class_path: cli_toys.ToyData
"""

DEEP = """\
trainer:
  accelerator: cpu
  max_epochs: 1
  val_check_interval: 0.25
  callbacks:
    - class_path: lightning_peft.BlockPruning
      init_args: {amount: 2, start: 25%, end: 75%, every: 25%}
model:
  class_path: cli_toys.DeepModule
data:
  class_path: cli_toys.ToyData
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_the_users_callbacks_logger_and_folder_are_kept_and_what_is_overruled_is_said(cli, recipe, tmp_path) -> None:
    status, data, error = cli("run", recipe(ORDINARY), "--out", "ours", "--json")
    assert status == 0, error
    assert data["dense"]["epochs"] == data["composed"]["epochs"] == 2  # EarlyStopping: the second is no better by 1.0
    assert len(list(Path("theirs/best").glob("*.ckpt"))) == 2  # one of each run
    assert len(list(Path("theirs").rglob("last*.ckpt"))) == 2
    assert len(list(Path("theirs/logged").rglob("metrics.csv"))) == 2
    assert Path("ours/model.ckpt").is_file()
    assert (Path("ours/curves.png")).is_file()
    assert [note.split(",")[0] for note in data["composed"]["notes"]] == ["enable_checkpointing: false is ignored"]
    assert "is ignored, because" in Path("ours/report.md").read_text()


def test_a_network_that_lost_blocks_loads_by_the_printed_lines_and_the_report_leads_with_what_that_saves(
    cli, recipe, tmp_path
) -> None:
    status, data, error = cli("run", recipe(DEEP), "--out", "out", "--json")
    assert status == 0, error
    assert any("lightning_peft.load_from_checkpoint(DeepModule" in line for line in data["loading"])
    wanted = torch.load("out/baked.ckpt", weights_only=True)["state_dict"]
    _, baked, _ = cli("bake", "out/model.ckpt", "-o", "plain.ckpt", "--json")
    _, shipped, _ = cli("export", "out/model.ckpt", "--to", "safetensors", "--json")
    assert baked["structural_changes"] == 2
    assert "lightning_peft.load_from_checkpoint" in baked["loading"][-1]
    for found in loaded(tmp_path, data, baked, shipped):
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # Two products a block and one at the end, of 8 inputs each; two of the four blocks are gone.
    assert (data["dense"]["forward_flops"], data["composed"]["forward_flops"]) == (4 * 128 + 48, 2 * 128 + 48)
    assert [fact["label"] for fact in data["facts"]][:3] == ["FLOPs a sample", "parameters", "training FLOPs"]
    assert data["facts"][0]["note"] == "dense 560 FLOP, 46 % fewer"
    assert Path("out/cost.png").is_file()
    assert "without lightning_peft" not in Path("out/report.md").read_text()


def test_a_class_that_saves_no_arguments_is_loaded_with_them(cli, toy, tmp_path) -> None:
    size = ["--model", "cli_toys.ForgetfulModule", "--model.size", "12"]
    status, data, error = cli("run", toy, *size, "--no-baseline", "--out", "out", "--json", "--trainer.max_epochs", "1")
    assert status == 0, error
    assert data["loading"][-1].endswith("weights_only=True, size=12)")
    assert not any("lightning_peft" in line for line in data["loading"])
    (found,) = loaded(tmp_path, data)
    assert found["model.0.weight"].shape == (12, 8)
    shown = cli("bake", "out/model.ckpt")[1]  # the file does not know the class
    assert "with your class for MyModule and, unless it saves them, the arguments it was trained with" in shown
    assert cli("export", "out/model.ckpt", "--to", "safetensors", "--json")[1]["loading"][-1].endswith("built by your class")


def test_a_run_without_seed_says_so(cli, toy) -> None:
    arguments = ["--no-baseline", "--trainer.max_epochs", "1", "--seed_everything", "false"]
    status, data, error = cli("run", toy, *arguments, "--out", "out", "--json")
    assert status == 0, error
    assert data["composed"]["seed"] is None
    assert "no seed" in Path("out/report.md").read_text()


def test_a_run_that_fails_early_leaves_its_folder_free(cli, toy) -> None:
    arguments = ["run", toy, "--no-baseline", "--json", "--trainer.max_epochs", "1"]
    assert cli(*arguments, "--out", "out", "--model.lr", "-1")[0] == 2
    status, data, error = cli(*arguments, "--out", "out")
    assert status == 0, error
    assert data["composed"]["steps"] == 4


def test_two_commands_do_not_share_a_folder(cli, toy) -> None:
    arguments = ["run", toy, "--no-baseline", "--json", "--trainer.max_epochs", "1"]
    with held(Path("runs/toy")):
        assert cli(*arguments)[1]["out"] == "runs/toy-2"
        status, _, error = cli(*arguments, "--out", "runs/toy")
        assert (status, "Another command is working" in error) == (2, True)
    with held(Path("runs/compare/toy")):
        assert "Another command" in cli("compare", toy, "--dense", "--seeds", "1")[2]
    assert cli(*arguments)[1]["out"] == "runs/toy"


def test_a_check_tries_all_and_keeps_nothing(cli, recipe) -> None:
    path = recipe(ORDINARY)
    before = set(Path().rglob("*"))
    status, data, error = cli("run", path, "--check", "--json", "--trainer.max_epochs", "500")
    assert status == 0, error
    assert data["checked"] == ["build", "train", "validate", "test", "bake", "load", "report", "export"]
    assert data["notes"] == []
    assert set(Path().rglob("*")) == before


def test_a_check_says_why_a_network_is_not_exported(cli, toy) -> None:
    status, shown, error = cli("run", toy, "--check", "--no-baseline", "--model", "cli_toys.UntraceableModule")
    assert status == 0, error
    assert "bake, load, report all worked" in shown
    (line,) = [line for line in shown.splitlines() if "is not exported" in line]
    assert line.startswith("The network is not exported: Untraceable could not be traced by torch.export")


def test_changed_code_and_lost_settings_are_told_apart_from_the_same_run(cli, toy, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    own = tmp_path / "own_model.py"
    own.write_text("from cli_toys import ToyModule\n\n\nclass OwnModule(ToyModule):\n    pass\n")
    arguments = ["run", toy, "--model", "own_model.OwnModule", "--no-baseline", "--out", "out", "--trainer.max_epochs", "1"]
    assert cli(*arguments)[0] == 0
    own.write_text(own.read_text() + "\n# other code\n")
    status, _, error = cli(*arguments, "--resume")
    assert (status, "own_model.py" in error) == (2, True)
    Path("out/composed/config.yaml").unlink()
    assert cli(*arguments, "--resume")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["run", "quikstart"], 2),
        (["show", "NMSparsty"], 2),
        (["bake", "none.ckpt"], 2),
        (["compare", "toy.yaml", "--each", "--seed_everything", "3"], 2),
        (["run", "toy.yaml", "--trainer.fast_dev_run", "true", "--no-baseline"], 2),
        (["run", "toy.yaml", "--out", "toy.yaml/inside"], 2),
        (["bake"], 2),
        (["lst"], 2),
    ],
)
def test_an_error_is_one_json_document_too(toy, capsys, arguments, status) -> None:
    from lightning_peft.cli.main import main

    try:
        found = main([*arguments, "--json"])
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert (found, told["exit_code"]) == (status, status)
    assert told["error"]
    assert told["error"] in captured.err
    assert "Traceback" not in captured.err


def test_a_recipe_of_another_folder_finds_the_classes_beside_it(tmp_path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "beside_me.py").write_text((Path(__file__).parent / "cli_toys.py").read_text())
    text = "trainer: {accelerator: cpu}\nmodel: {class_path: beside_me.ToyModule}\ndata: {class_path: beside_me.ToyData}\n"
    (project / "mine.yaml").write_text(text)
    done = python("-m", "lightning_peft.cli.main", "run", str(project / "mine.yaml"), "--check", "--json", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loads"]

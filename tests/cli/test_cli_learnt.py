"""`run` and `compare` with a method that trains deltas alone: its partial checkpoints, and what was learnt."""

from __future__ import annotations

import pytest
import torch
from cli_toys import ToyModule

LORA = """\
    - class_path: lightning_peft.LoRA
      init_args: {rank: 1, targets: all-linear, exclude: null}
"""


@pytest.fixture
def tuned(toy):
    """Path of a recipe that trains deltas."""
    head, _, tail = toy.read_text().partition("    - class_path: cli_toys.ToyMask\n")
    toy.write_text(head + LORA + "model:\n" + tail.partition("model:\n")[2])
    return toy


def test_run_shows_what_deltas_learnt_beside_full_training(cli, tuned, tmp_path) -> None:
    out = tmp_path / "out"
    status, data, error = cli("run", tuned, "--out", out, "--json", "--trainer.max_epochs", "2")
    assert status == 0, error
    ranks = {name: [row["effective_rank"] for row in data[name]["learnt"]["rows"]] for name in ("dense", "composed")}
    assert ranks["composed"] == pytest.approx([1, 1], abs=1e-4)
    assert min(ranks["dense"]) > 1.5
    assert data["composed"]["learnt"]["notes"] == data["dense"]["learnt"]["notes"] == []
    assert (out / "learnt.png").is_file()
    assert "## What was learnt" in (out / "report.md").read_text()


def test_the_baked_file_of_deltas_is_whole_and_differs_by_what_was_learnt(cli, tuned, tmp_path) -> None:
    out = tmp_path / "out"
    _, data, _ = cli("run", tuned, "--out", out, "--json", "--no-baseline", "--trainer.max_epochs", "1")
    assert "model.0.weight" not in torch.load(out / "model.ckpt", weights_only=True)["state_dict"]
    baked = torch.load(out / "baked.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(0)
    start = ToyModule().state_dict()
    for row in data["composed"]["learnt"]["rows"]:
        assert (baked[row["name"]] - start[row["name"]]).norm().item() == pytest.approx(row["norm"], rel=1e-4)
    assert data["weights"]["parameters"] == 195
    assert data["loading"]
    assert "weights_only=True" in data["loading"][-1]


def test_a_check_of_deltas_exports_too(cli, tuned) -> None:
    status, data, error = cli("run", tuned, "--check", "--json")
    assert status == 0, error
    assert data["checked"][-1] == "export"


def test_compare_has_a_row_a_variant(cli, tuned, tmp_path) -> None:
    arguments = ("compare", tuned, "--dense", "--seeds", "2", "--out", tmp_path / "c", "--trainer.max_epochs", "1")
    assert cli(*arguments)[0] == 0
    text = (tmp_path / "c" / "report.md").read_text().partition("## What was learnt")[2]
    assert "| full | 2 | " in text
    assert "| dense | 2 | " in text
    assert "full: change" in text

"""What an adaptation study may take from its folder: only what the same source, data, recipe and versions gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapt_toys import BlobData, BlobModule

from lightning_peft.shifts.data import data_digest

RECIPE = """\
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 1
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    - class_path: lightning_peft.BatchNormAdapt
model:
  class_path: adapt_toys.BlobModule
data:
  class_path: adapt_toys.BlobData
"""


@pytest.fixture
def study(cli, tmp_path):
    """Run a study, by default in one folder; return exit code, data and standard error."""
    path = tmp_path / "blobs.yaml"
    path.write_text(RECIPE)

    def run(*arguments: object, out: str = "out"):
        return cli("adapt", path, "--out", out, "--json", "--seeds", "1", "--shifts", "moved", "--clean", "0", *arguments)

    return run


def source(seed: int) -> str:
    """Write the checkpoint of a source model."""
    torch.manual_seed(seed)
    torch.save({"state_dict": BlobModule().state_dict()}, f"source-{seed}.ckpt")
    return f"source-{seed}.ckpt"


def test_another_source_is_refused_and_a_missing_one_is_an_error_at_once(study) -> None:
    first, second = source(1), source(2)
    status, data, error = study("--checkpoint", first)
    assert status == 0, error
    kept = {path: path.read_bytes() for path in Path("out").rglob("*.json")}
    for arguments, answer in (
        (["--checkpoint", second], "source model: a checkpoint with sha256"),
        ([], "source model: trained by the recipe"),
        (["--checkpoint", "missing.ckpt"], "There is no file missing.ckpt"),
    ):
        status, _, error = study(*arguments)
        assert (status, answer in error) == (2, True)
    assert {path: path.read_bytes() for path in Path("out").rglob("*.json")} == kept
    torch.save(torch.load(second, weights_only=True), first)  # the same name, another model
    assert study("--checkpoint", first)[0] == 2
    fresh = study("--checkpoint", second, out="fresh")[1]
    assert fresh["records"][0]["parts"] != data["records"][0]["parts"]


def test_episodes_of_other_data_or_another_version_are_run_again(study, monkeypatch) -> None:
    checkpoint = source(1)
    before = study("--checkpoint", checkpoint)[1]["records"]
    again = study("--checkpoint", checkpoint)[1]["records"]
    assert again == before  # times included: read back
    moved = BlobData.shifted

    def other(self, shift: str, severity: int):
        data = moved(self, shift, severity)
        return torch.utils.data.TensorDataset(data.tensors[0] - 3.0, data.tensors[1])

    monkeypatch.setattr(BlobData, "shifted", other)
    after = study("--checkpoint", checkpoint)[1]["records"]
    assert after[0]["made_with"] != before[0]["made_with"]
    assert after[0]["parts"] != before[0]["parts"]


def test_one_seed_has_no_spread(study) -> None:
    data = study("--checkpoint", source(1))[1]
    assert data["protocols"]["continual"]["source"]["error"]["std"] is None
    assert "±" not in Path("out/report.md").read_text()
    assert json.loads(Path("out/report.json").read_text())["protocols"]["continual"]["source"]["error"]["std"] is None


def test_the_digest_of_data_sees_size_and_samples_and_repeats_random_views() -> None:
    class Noisy(list):
        def __getitem__(self, place):
            return torch.rand(3), place

    assert data_digest(Noisy(range(4))) == data_digest(Noisy(range(4)))
    assert data_digest(Noisy(range(4))) != data_digest(Noisy(range(5)))

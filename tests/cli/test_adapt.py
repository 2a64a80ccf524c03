"""`adapt`: methods under shift, from the command line."""

from __future__ import annotations

import json

import pytest
import torch

RECIPE = """\
# recipe: {summary: "Blobs, for tests"}
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 4
  callbacks:
    - class_path: lightning_peft.FisherEstimator
    - class_path: lightning_peft.BatchNormAdapt
    - class_path: lightning_peft.Tent
      init_args: {lr: 0.05}
    - class_path: lightning_peft.EATA
      init_args: {lr: 0.05, d_margin: 0.9, fisher_alpha: 1.0}
    - class_path: lightning_peft.CoTTA
      init_args: {lr: 0.05, threshold: 0.0}
model:
  class_path: adapt_toys.BlobModule
data:
  class_path: adapt_toys.BlobData
"""


@pytest.fixture
def blobs(tmp_path):
    path = tmp_path / "blobs.yaml"
    path.write_text(RECIPE)
    return path


def test_all_protocols_are_run_reported_and_not_repeated(cli, blobs, tmp_path) -> None:
    out = tmp_path / "out"
    protocols = ["reset", "continual", "mixed", "gradual", "correlated"]
    arguments = ["adapt", blobs, "--out", out, "--json", "--protocols", *protocols]
    status, data, error = cli(*arguments, "--seeds", "1")
    assert status == 0, error
    assert list(data["protocols"]) == protocols
    for numbers in data["protocols"].values():
        assert list(numbers) == ["source", "BatchNormAdapt", "Tent", "EATA", "CoTTA"]
        assert [numbers[name]["forward"]["mean"] for name in numbers] == [1.0] * 4 + [3.0]
        assert [numbers[name]["backward"]["mean"] > 0 for name in numbers] == [False, False, True, True, True]
        assert all(0 <= numbers[name]["error"]["mean"] <= 1 for name in numbers)
    # Normalised with batches of one class each, the network has nothing to tell classes by.
    errors = {protocol: data["protocols"][protocol]["BatchNormAdapt"]["error"]["mean"] for protocol in protocols}
    assert errors["correlated"] > errors["continual"] + 0.2
    assert {f"{kind}-{protocol}.png" for kind in ("stream", "error") for protocol in protocols} <= {
        p.name for p in out.iterdir()
    }
    times = {path: path.stat().st_mtime_ns for path in out.rglob("episodes/**/*.json")}
    assert len(times) == 5 * (2 + 1 + 1 + 1 + 1)
    status, more, _ = cli(*arguments, "--seeds", "2")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(more["records"]) == 2 * len(data["records"])
    assert more["records"][: len(data["records"])] == data["records"]


def test_another_choice_of_shifts_is_another_stream(cli, blobs, tmp_path) -> None:
    arguments = ["adapt", blobs, "--out", tmp_path / "out", "--json", "--seeds", "1", "--methods", "Tent"]
    both = cli(*arguments)[1]["protocols"]["continual"]["Tent"]
    one = cli(*arguments, "--shifts", "scaled", "--severities", "1", "--clean", "10")[1]["protocols"]["continual"]["Tent"]
    assert list(both["parts"]) == ["scaled 3", "moved"]
    assert list(one["parts"]) == ["scaled 1"]


def test_numbers_are_those_of_a_test_by_hand(cli, blobs, tmp_path) -> None:
    from adapt_toys import BlobData, BlobModule
    from lightning import Trainer

    data = cli("adapt", blobs, "--out", tmp_path / "out", "--json", "--seeds", "1", "--clean", "0")[1]
    module = BlobModule()
    module.load_state_dict(torch.load(tmp_path / "out" / "source.ckpt", weights_only=True)["state_dict"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    loader = torch.utils.data.DataLoader(BlobData().shifted("scaled", 3), batch_size=90)
    accuracy = Trainer(accelerator="cpu", **quiet).test(module, loader, verbose=False)[0]["test/accuracy"]
    assert data["protocols"]["continual"]["source"]["parts"]["scaled 3"] == pytest.approx(1 - accuracy, abs=1e-6)
    assert "clean_error" not in data["protocols"]["continual"]["source"]


def test_the_source_may_be_as_built_or_a_checkpoint(cli, blobs, tmp_path) -> None:
    arguments = ["--json", "--seeds", "1", "--shifts", "moved", "--methods", "EATA"]
    trained = cli("adapt", blobs, "--out", tmp_path / "a", *arguments)[1]["protocols"]["continual"]["source"]
    source = tmp_path / "a" / "source.ckpt"
    given = cli("adapt", blobs, "--out", tmp_path / "b", "--checkpoint", source, *arguments)[1]
    assert given["protocols"]["continual"]["source"]["error"] == trained["error"]
    built = cli("adapt", blobs, "--out", tmp_path / "c", *arguments, "--trainer.max_epochs", "0")[1]["protocols"]["continual"]
    assert built["source"]["error"]["mean"] > trained["error"]["mean"]
    saved = torch.load(tmp_path / "c" / "source.ckpt", weights_only=True)["callbacks"]
    assert saved["lightning_peft/fisher_estimator"]["state"]["scores"]  # scored in the validation, as nothing was trained


def test_mistakes_are_answered_before_anything_is_trained(cli, blobs, toy, tmp_path) -> None:
    for arguments, answer in (
        (["--shifts", "scald"], "Did you mean scaled?"),
        (["--methods", "Tend"], "Did you mean tent?"),
        (["--severities", "9"], "it has 1, 2, 3"),
        (["--protocols", "continuous"], "Did you mean continual?"),
        (["--seeds", "0"], "at least one seed"),
        (["--data", "adapt_toys.PlainData"], "PlainData has no shifts"),
        (["--trainer.callbacks+", "lightning_peft.Tent"], "called 'tent'"),
    ):
        status, _, error = cli("adapt", blobs, "--out", tmp_path / "out", *arguments)
        assert status == 2
        assert answer in error
    assert "no method that adapts" in cli("adapt", toy)[2]
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_settings_is_refused(cli, blobs, tmp_path) -> None:
    arguments = ["adapt", blobs, "--out", tmp_path / "out", "--seeds", "1", "--methods", "Tent", "--shifts", "moved"]
    assert cli(*arguments)[0] == 0
    status, _, error = cli(*arguments, "--model.lr", "0.5")
    assert status == 2
    assert "other settings" in error


def test_an_interrupted_study_goes_on(cli, blobs, tmp_path, monkeypatch) -> None:
    from lightning_peft.cli.adapt_trials import Trials

    arguments = ["adapt", blobs, "--out", tmp_path / "out", "--json", "--seeds", "1", "--protocols", "reset"]
    one, count = Trials._one, []

    def stop_at_third(self, *given):
        count.append(given)
        if len(count) == 4:
            raise KeyboardInterrupt
        return one(self, *given)

    monkeypatch.setattr(Trials, "_one", stop_at_third)
    status, _, error = cli(*arguments)
    assert status == 130
    assert "goes on from there" in error
    assert len(list((tmp_path / "out").rglob("episodes/**/*.json"))) == 3
    monkeypatch.setattr(Trials, "_one", one)
    resumed = cli(*arguments)[1]
    whole = cli("adapt", blobs, "--out", tmp_path / "whole", *arguments[4:])[1]
    assert [_timeless(record) for record in resumed["records"]] == [_timeless(record) for record in whole["records"]]


def test_the_bar_moves_with_every_batch_and_at_once_over_what_is_done(cli, blobs, tmp_path, monkeypatch) -> None:
    from rich.progress import Progress

    moves, advance = [], Progress.advance

    def spy(self, task_id, steps):
        advance(self, task_id, steps)
        task = self.tasks[task_id]
        moves.append((steps, task.completed, task.total))

    monkeypatch.setattr(Progress, "advance", spy)
    arguments = ["adapt", blobs, "--out", tmp_path / "out", "--json", "--seeds", "1", "--methods", "Tent", "--clean", "10"]
    for size in ([16] * 5 + [10]) * 2 + [10], [190]:  # two shifts of 90 samples, then clean ones
        moves.clear()
        assert cli(*arguments)[0] == 0
        assert [steps for steps, _, _ in moves] == size * 2, "the source, then Tent"
        assert moves[-1][1:] == (380, 380)


def test_labels_are_read_only_for_the_protocol_that_orders_by_them(cli, blobs, tmp_path, monkeypatch) -> None:
    from lightning_peft.cli import adapt_trials

    read, labels_in = [], adapt_trials.labels_in
    monkeypatch.setattr(adapt_trials, "labels_in", lambda loader, data: read.append(len(data)) or labels_in(loader, data))
    arguments = ["adapt", blobs, "--out", tmp_path / "out", "--json", "--seeds", "1", "--methods", "Tent", "--protocols"]
    assert cli(*arguments, "reset", "continual", "mixed", "gradual")[0] == 0
    assert read == [1], "whether there are any is asked of one sample"
    read.clear()
    assert cli(*arguments, "gradual", "correlated")[0] == 0
    assert read == [1, 90, 90]


def _timeless(record):
    return json.dumps({key: value for key, value in record.items() if key != "seconds"})


def test_a_study_is_not_trained_as_one_run(cli, blobs) -> None:
    blobs.write_text(RECIPE.replace('"Blobs, for tests"', '"Blobs, for tests", command: adapt'))
    for command in ("run", "compare"):
        status, _, error = cli(command, blobs)
        assert status == 2
        assert f"lightning-peft adapt {blobs}" in error

"""Calibration by every estimator in adaptation studies: of the answers under shift, and where it is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapt_toys import BlobData, BlobModule
from lightning import Trainer

from lightning_peft import Tent
from lightning_peft.measure import confidence
from lightning_peft.measure.calibration import calibration_table, equal_width_error
from lightning_peft.report.adaptation import Study, adaptation_report
from lightning_peft.shifts import EpisodeRecord, Part, StreamRecorder, episodes, stream_loader
from lightning_peft.shifts.data import CLEAN

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
PARTS = [Part("scaled", 2), Part("moved", 0)]
RECIPE = """\
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 3
  callbacks:
    - class_path: lightning_peft.BatchNormAdapt
    - class_path: lightning_peft.Tent
      init_args: {lr: 0.05}
model:
  class_path: adapt_toys.BlobModule
data:
  class_path: adapt_toys.BlobData
"""


class Gathering(BlobModule):
    """Keeps what its own step got from the network."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def test_step(self, batch, batch_idx):
        self.answers.append((self.net(batch[0]).detach().clone(), batch[1]))


def stream(protocol: str, clean: int):
    """An episode, and the loader of it."""
    data = BlobData()
    template = data.test_dataloader()
    sets = {CLEAN: template.dataset} | {part: data.shifted(part.shift, part.severity) for part in PARTS}
    episode = episodes(protocol, PARTS, sets, seed=3, clean=clean)[0]
    return episode, stream_loader(template, sets, episode)


def record(protocol: str = "continual", *, clean: int = 30, methods: tuple = ()) -> tuple[EpisodeRecord, list[torch.Tensor]]:
    """A record, and what the module saw."""
    torch.manual_seed(0)
    episode, loader = stream(protocol, clean)
    module, recorder = Gathering(), StreamRecorder()
    Trainer(accelerator="cpu", callbacks=[recorder, *methods], **QUIET).test(module, loader, verbose=False)
    found = recorder.record(episode, "Tent" if methods else "source", protocol, 3)
    return found, [torch.cat(many) for many in zip(*module.answers, strict=True)]


@pytest.mark.parametrize("protocol", ["continual", "mixed", "reset"])
@pytest.mark.parametrize("adapts", [False, True])
def test_answers_under_shift_are_judged_as_the_module_got_them(protocol: str, adapts: bool) -> None:
    found, (logits, labels) = record(protocol, methods=(Tent(lr=0.05),) if adapts else ())
    assert len(labels) == (120 if protocol == "reset" else 210)
    assert found.calibration == calibration_table(logits[:-30], labels[:-30])
    assert found.calibration != calibration_table(logits, labels), "clean samples come last and are not judged"
    sure, chosen = logits.softmax(1).max(1)
    assert found.clean is not None
    assert found.clean.ece == pytest.approx(equal_width_error(sure[-30:], chosen[-30:] == labels[-30:], 15), abs=1e-5)


def test_without_clean_samples_all_are_judged() -> None:
    found, (logits, labels) = record(clean=0)
    assert found.calibration == calibration_table(logits, labels)


def test_a_record_is_read_as_it_was_written_and_one_of_an_earlier_version_too(tmp_path) -> None:
    found, _ = record()
    found.write(tmp_path / "now.json")
    assert EpisodeRecord.read(tmp_path / "now.json") == found
    old = json.loads((tmp_path / "now.json").read_text())
    del old["calibration"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    earlier = EpisodeRecord.read(tmp_path / "old.json")
    assert earlier.calibration == {}
    assert (earlier.parts, earlier.clean, earlier.curve) == (found.parts, found.clean, found.curve)


def test_too_many_logits_are_not_kept_and_the_report_says_so(monkeypatch) -> None:
    whole, _ = record()
    monkeypatch.setattr(confidence, "MOST", 3 * 100)
    found, _ = record()
    assert found.calibration == {}
    assert (found.parts, found.clean) == (whole.parts, whole.clean)
    (section,) = adaptation_report(Study("blobs", [found])).sections
    assert "Not judged by every estimator: source" in section.text[-1]
    assert [table.columns[0] for table in section.tables] == ["method"] * 3


def test_the_recorder_holds_numbers_of_its_own() -> None:
    wide = torch.zeros(4, 1000)
    recorder = StreamRecorder()
    recorder._keep(wide[:, :3], torch.zeros(4, dtype=torch.long))
    assert recorder.logits[0].untyped_storage().nbytes() == 4 * 4 * 3
    recorder._keep(torch.zeros(4, 3, dtype=torch.double), torch.zeros(4, dtype=torch.long))
    assert recorder.logits[1].dtype == torch.float32


def test_a_study_shows_means_over_seeds_and_names_what_earlier_versions_recorded(cli, tmp_path) -> None:
    recipe = tmp_path / "blobs.yaml"
    recipe.write_text(RECIPE)
    arguments = ["adapt", recipe, "--out", tmp_path / "out", "--json", "--seeds", "2", "--clean", "12"]
    status, data, error = cli(*arguments)
    assert status == 0, error
    methods = data["protocols"]["continual"]
    for method in ("source", "BatchNormAdapt", "Tent"):
        tables = [each["calibration"] for each in data["records"] if each["method"] == method]
        assert len(tables) == 2
        for name, pair in methods[method]["calibration"].items():
            assert pair == pytest.approx([sum(table[name][moment] for table in tables) / 2 for moment in (0, 1)])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| estimator | source | BatchNormAdapt | Tent |" in text
    assert f"| ECE, 15 bins, % | {cells(methods, 'ECE, 15 bins', unit=100, digits=1)} |" in text
    assert f"| Brier score | {cells(methods, 'Brier score', unit=1, digits=3)} |" in text
    assert f"| ECE, 15 bins, % | {by_hand(tmp_path / 'out' / 'source.ckpt')} to" in text
    assert "Not judged" not in text
    assert "<th>estimator</th>" in (tmp_path / "out" / "report.html").read_text().replace(' class="n"', "")

    old = next((tmp_path / "out").rglob("continual-seed-1/**/Tent.json"))
    kept = json.loads(old.read_text())
    del kept["calibration"]
    old.write_text(json.dumps(kept))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("episodes/**/*.json")}
    again = cli(*arguments)[1]["protocols"]["continual"]
    assert {path: path.stat().st_mtime_ns for path in times} == times, "nothing is run again"
    assert again["Tent"].pop("calibration") == {}
    assert again["source"] == methods["source"]
    assert again["Tent"] == {name: value for name, value in methods["Tent"].items() if name != "calibration"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| estimator | source | BatchNormAdapt |\n" in text
    assert "Not judged by every estimator: Tent." in text


def cells(methods: dict, name: str, *, unit: float, digits: int) -> str:
    pairs = [methods[method]["calibration"][name] for method in methods]
    return " | ".join(f"{unit * before:.{digits}f} to {unit * after:.{digits}f}" for before, after in pairs)


def by_hand(checkpoint: Path) -> str:
    """ECE of the source on both shifted sets at once."""
    module, data = BlobModule().eval(), BlobData()
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    sets = [data.shifted("scaled", 3).tensors, data.shifted("moved", 0).tensors]
    with torch.no_grad():
        sure, chosen = module.net(torch.cat([inputs for inputs, _ in sets])).softmax(1).max(1)
    error = equal_width_error(sure, chosen == torch.cat([labels for _, labels in sets]), 15)
    return f"{100 * error:.1f}"

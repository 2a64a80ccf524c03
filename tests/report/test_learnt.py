"""What was learnt, as reports show it."""

from __future__ import annotations

import json

from lightning_peft.measure.weight_changes import Learnt, WeightChange
from lightning_peft.report.comparison import Comparison, comparison_report
from lightning_peft.report.contents import Section
from lightning_peft.report.learnt import learnt_section
from lightning_peft.report.report import Report
from lightning_peft.report.run import RunEvidence, run_report
from lightning_peft.report.trial import Trial
from lightning_peft.report.weights import weigh


def trial(name: str, *rows: WeightChange, seed: int = 0, notes: tuple[str, ...] = ()) -> Trial:
    return Trial(name, seed, learnt=Learnt(rows, notes, 0.5).as_data())


def change(name: str, norm: float, *found: float | None, relative: float | None = 0.25) -> WeightChange:
    return WeightChange(f"{name}.weight", (8, 4), norm, relative, *found)  # type: ignore[arg-type]


def section_of(report: Report) -> Section:
    return next(section for section in report.sections if section.title == "What was learnt")


DENSE = trial("dense", change("emb", 1, 3.5, 2.5, 0), change("fc", 2, 3.5, 1.5, 1), change("out", 4, 1.5, 1, 2))
LORA = trial("composed", change("fc", 0.5, 1.5, 1, 3, relative=0.01), change("out", 1, 1.25, 1, 1, relative=0.03))


def test_a_run_stands_beside_its_dense_baseline(tmp_path) -> None:
    report = run_report(RunEvidence("r", "", "", LORA, weigh({"state_dict": {}}), DENSE))
    summary, layers = section_of(report).tables
    assert summary.rows == (("dense", 3, "25.00", "3.5", "1.5", "3"), ("composed", 2, "2.00", "1.4", "1.0", "4"))
    assert layers.columns[2:] == (
        *("dense: change", "dense: ranks", "dense: intruders"),
        *("composed: change", "composed: ranks", "composed: intruders"),
    )
    assert layers.rows == (
        ("emb", "8 x 4", "1 (25 %)", "3.5, 2.5", "0", "", "", ""),
        ("fc", "8 x 4", "2 (25 %)", "3.5, 1.5", "1", "0.5 (1 %)", "1.5, 1.0", "3"),
        ("out", "8 x 4", "4 (25 %)", "1.5, 1.0", "2", "1 (3 %)", "1.2, 1.0", "1"),
    )
    report.save(tmp_path)
    assert (tmp_path / "learnt.png").stat().st_size > 5000
    assert "| fc | 8 x 4 | 2 (25 %) | 3.5, 1.5 | 1 | 0.5 (1 %) | 1.5, 1.0 | 3 |" in (tmp_path / "report.md").read_text()
    assert "Intruders are those" in (tmp_path / "report.html").read_text()
    data = json.loads((tmp_path / "report.json").read_text())
    row = data["composed"]["learnt"]["rows"][1]
    assert (row["name"], row["shape"], row["norm"], row["relative"]) == ("out.weight", [8, 4], 1, 0.03)
    assert (row["effective_rank"], row["stable_rank"], row["intruders"]) == (1.25, 1, 1)


def test_variants_are_averaged_over_seeds() -> None:
    other = trial("composed", change("fc", 1.5, 2.5, 1, 2, relative=0.03), change("out", 1, 1.25, 1, 1), seed=1)
    report = comparison_report(Comparison("r", "", {"full": [LORA, other], "dense": [DENSE, DENSE]}))
    summary, layers = section_of(report).tables
    assert summary.rows[0] == ("full", 2, "8.00 ± 8.49", "1.6 ± 0.4", "1.0 ± 0.0", "3.5 ± 0.7")
    assert summary.caption == "Medians over matrices, means over seeds"
    assert layers.rows[1] == ("fc", "8 x 4", "1 (2 %)", "2.0, 1.0", "2.5", "2 (25 %)", "3.5, 1.5", "1.0")


def test_notes_stand_under_the_name_of_their_run_once() -> None:
    noted = trial("composed", notes=("The structure was edited.",))
    section = learnt_section({"full": [noted, noted], "dense": [DENSE]})
    assert section is not None
    assert section.text[-1] == "full: The structure was edited."
    assert [row[0] for row in section.tables[0].rows] == ["dense"]
    alone = learnt_section({"full": [noted]})
    assert alone == Section("What was learnt", ("full: The structure was edited.",))


def test_what_was_not_decomposed_stays_empty() -> None:
    section = learnt_section({"full": [trial("full", change("fc", 2.0), change("zero", 3.0, 1, 1, 1, relative=None))]})
    assert section is not None
    summary, layers = section.tables
    assert summary.rows == (("full", 2, "25.00", "1.0", "1.0", "1"),)
    assert layers.rows == (("fc", "8 x 4", "2 (25 %)", "", ""), ("zero", "8 x 4", "3", "1.0, 1.0", "1"))


def test_trials_of_earlier_versions_have_no_section() -> None:
    assert learnt_section({"full": [Trial("full", 0)]}) is None
    report = run_report(RunEvidence("r", "", "", Trial("composed", 0), weigh({"state_dict": {}})))
    assert "What was learnt" not in [section.title for section in report.sections]


def test_a_training_that_changed_no_matrix_has_no_section() -> None:
    assert learnt_section({"full": [Trial("full", 0, learnt=Learnt().as_data())]}) is None


def test_a_training_that_moved_nothing_is_drawn_too(tmp_path) -> None:
    still = trial("composed", change("fc", 0, 0, 0, 0, relative=0.0))
    run_report(RunEvidence("r", "", "", still, weigh({"state_dict": {}}))).save(tmp_path)
    assert (tmp_path / "learnt.png").is_file()

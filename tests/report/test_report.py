"""The report's renderings, plots, counts and curves."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import NMSparsity
from lightning_peft.measure.confidence import reliability_bins
from lightning_peft.network.labels import labels_of
from lightning_peft.report import plots as report_plots
from lightning_peft.report.checkpoint import checkpoint_report
from lightning_peft.report.comparison import Comparison, comparison_report
from lightning_peft.report.contents import Fact, Figure, Section, Table, is_numeric
from lightning_peft.report.curves import CurvePoint, over_epochs, over_steps, read_curves
from lightning_peft.report.report import Report
from lightning_peft.report.run import RunEvidence, run_report
from lightning_peft.report.trial import Trial
from lightning_peft.report.weights import size_estimate, weigh
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit


def sample() -> Report:
    figure = Figure("curve", "A curve & more.", lambda: report_plots.lines({"loss": {"dense": ([1, 2], [3, 1])}}, "epoch"))
    table = Table(("layer", "non-zero"), (("fc|1", 12), ("<b>", 3)), "Counts")
    section = Section("Weights", ("Counted with `count`.",), (table,), (figure,), code="a < b")
    data = {"loss": math.nan, "rows": (1, 2)}
    return Report("Run <1>", "One line.", (Fact("accuracy", "75 %", "dense 76 %", True),), (section,), data, "make it")


def test_html_is_self_contained_and_escaped(tmp_path) -> None:
    sample().save(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "<h1>Run &lt;1&gt;</h1>" in html
    assert "&lt;b&gt;" in html
    assert "a &lt; b" in html
    assert "Counted with <code>count</code>." in html
    assert html.count("data:image/png;base64,") == 2  # one for light paper, one for dark
    assert "http" not in html.replace("https://arxiv", "")
    assert "prefers-color-scheme:dark" in html
    assert "@media print" in html


def test_markdown_refers_to_the_plots_and_keeps_table_cells_apart(tmp_path) -> None:
    sample().save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "![A curve & more.](curve.png)" in text
    assert "| fc\\|1 | 12 |" in text
    assert "| --- | ---: |" in text
    width, height = struct.unpack(">II", (tmp_path / "curve.png").read_bytes()[16:24])
    assert width > height > 300


def test_json_is_strict(tmp_path) -> None:
    sample().save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data == {"title": "Run <1>", "made_by": "make it", "loss": None, "rows": [1, 2]}


def test_without_matplotlib_the_report_says_how_to_get_plots(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report_plots, "available", lambda: False)
    files = {path.name for path in sample().save(tmp_path)}
    assert files == {"report.html", "report.md", "report.json"}
    assert 'pip install "lightning-peft[report]"' in (tmp_path / "report.md").read_text()
    assert "lightning-peft[report]" in (tmp_path / "report.html").read_text()


def test_columns_of_numbers_are_recognised() -> None:
    table = Table(("a", "b", "c", "d"), (("x", "12 %", "", "2:4"), ("1y", "-3 points", "+1", "dense")))
    assert [is_numeric(table, column) for column in range(4)] == [False, True, True, False]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_reliability_bins_keep_every_sample_in_the_bin_of_its_confidence(samples) -> None:
    bins = reliability_bins([sure for sure, _ in samples], [right for _, right in samples], bins=10)
    assert sum(share for *_, share in bins) == pytest.approx(1)
    assert sum(accuracy * share for _, accuracy, share in bins) == pytest.approx(sum(r for _, r in samples) / len(samples))
    for index, (confidence, _, share) in enumerate(bins):
        if share:
            assert index / 10 - 1e-6 <= confidence <= (index + 1) / 10 + 1e-6


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((torch.zeros(2, 3), torch.tensor([0, 1])), True),
        ({"input_ids": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}, True),
        ((torch.zeros(2, 3), torch.zeros(2)), False),  # regression
        (torch.zeros(2, 3), False),
        ({"input_ids": torch.zeros(2, 3)}, False),
    ],
)
def test_labels_are_found_or_left_alone(batch, found) -> None:
    assert (labels_of(batch) is not None) == found


def test_curves_of_a_resumed_run_join_and_the_later_session_wins(tmp_path) -> None:
    for version, text in ((0, "epoch,loss,step\n0,3.0,1\n0,2.0,2\n"), (1, "acc,epoch,loss,step\n,0,1.5,2\n0.5,1,1.0,3\n")):
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(text)
    curves = read_curves(tmp_path)
    assert over_steps(curves, "loss") == ([1, 2, 3], [3.0, 1.5, 1.0])
    assert over_epochs(curves, "acc") == ([2.0], [0.5])
    assert over_steps(curves, "other") is None


def sparse_checkpoint() -> dict:
    """A checkpoint as training with N:M writes it: the map recorded, the stored weight dense."""
    import lightning_peft

    lightning_peft.NMSparsity  # noqa: B018 - loading the plugin makes its map known
    record = {"map": "nm", "method": "NMSparsity", "config": {"n": 2, "m": 4, "dim": 1}}
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return {
        "state_dict": {
            "fc.parametrizations.weight.original": weight,
            "fc.bias": torch.ones(6),
            "bn.running_mean": torch.ones(6),
        },
        "lightning_peft": {
            "version": 1,
            "methods": [{"method": "NMSparsity", "name": "nm_sparsity", "config": {"pattern": "2:4"}, "steps": 5}],
            "weights": {"fc.weight": [record]},
        },
        "epoch": 1,
        "global_step": 5,
    }


def test_weights_are_counted_as_baked() -> None:
    weights = weigh(sparse_checkpoint())
    assert weights.parameters == 48 + 6  # statistics are no parameters
    assert weights.nonzero == 24 + 6
    (row,) = weights.rows
    assert (row.name, row.pattern, row.maps, row.density) == ("fc.weight", "2:4", ("nm",), 0.5)
    assert sum(weights.after) <= 24 < sum(weights.before) <= 48
    # 24 values of 32 bits with 2 bits of position each, and six biases.
    assert size_estimate(weights) == {"dense": 54 * 4.0, "packed": 24 * 34 / 8 + 6 * 4.0}


def test_a_weight_that_layers_share_is_counted_once(tmp_path) -> None:
    torch.manual_seed(0)
    tied = Tied("sgd")
    fit([NMSparsity("2:4", targets="all-linear", exclude=())], module=tied, after=[every_epoch(tmp_path)], max_epochs=1)
    weights = weigh(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True))
    assert weights.parameters == sum(parameter.numel() for parameter in tied.parameters())
    assert weights.nonzero == sum(int(parameter.count_nonzero()) for parameter in tied.parameters())


class Tied(Plain):
    """Its second layer is called twice, by two names."""

    def build(self) -> None:
        super().build()
        self.again = self.model[2]

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model[4](self.again(self.model[:4](inputs)))


def test_a_checkpoint_alone_makes_a_report(tmp_path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(sparse_checkpoint(), path)
    report = checkpoint_report(path)
    (proof,) = report.data["nm_proof"]
    assert (proof["groups"], proof["violations"], proof["exact_groups"], proof["holds"]) == (12, 0, 12, True)
    assert report.data["methods"][0]["steps"] == 5
    report.save(tmp_path / "about")
    assert "NMSparsity" in (tmp_path / "about" / "report.html").read_text()


def test_a_run_with_a_broken_proof_says_so() -> None:
    from lightning_peft.baking.nm_proof import prove_nm_state_dict

    proofs = prove_nm_state_dict({"fc.weight": torch.ones(2, 8)}, {"fc.weight": "2:4"})
    checkpoint = {"state_dict": {"fc.weight": torch.ones(2, 8)}}
    evidence = RunEvidence("r", "", "test/accuracy", Trial("composed", 0), weigh(checkpoint), proofs=proofs)
    facts = {fact.label: fact for fact in run_report(evidence).facts}
    assert (facts["2:4 proof"].value, facts["2:4 proof"].good) == ("broken", False)


def test_calibration_errors_stand_in_the_reports_of_runs_and_comparisons() -> None:
    errors = {"dense": {"ECE, 15 bins": [0.107, 0.068], "temperature": [1.0, 1.6]}, "composed": {"ECE, 15 bins": [0.051, 0.06]}}
    dense, composed = (Trial(name, 0, calibration=[(0.9, 0.8, 1.0)], calibration_errors=errors[name]) for name in errors)
    report = run_report(RunEvidence("r", "", "", composed, weigh({"state_dict": {}}), dense))
    (table,) = next(section.tables for section in report.sections if section.title == "Calibration")
    assert table.columns == ("estimator", "dense", "composed")
    assert table.rows == (("ECE, 15 bins, %", "10.7 to 6.8", "5.1 to 6.0"), ("temperature", "1.60", ""))

    other = Trial("dense", 1, calibration_errors={"ECE, 15 bins": [0.127, 0.072], "temperature": [1.0, 1.4]})
    without = Trial("without A", 0)  # labels were not told
    report = comparison_report(Comparison("r", "", {"full": [dense, other], "without A": [without, without]}))
    (table,) = next(section.tables for section in report.sections if section.title == "Calibration")
    assert table.columns == ("estimator", "full")
    assert table.rows == (("ECE, 15 bins, %", "11.7 to 7.0"), ("temperature", "1.50"))


def trial(name: str, seed: int, accuracy: float) -> Trial:
    return Trial(name, seed, metrics={"test/accuracy": accuracy, "test/loss": 1 - accuracy}, parameters=10, nonzero=5)


def test_differences_are_paired_by_seed(tmp_path) -> None:
    trials = {
        "full": [trial("full", 0, 0.7), trial("full", 1, 0.9)],
        "without A": [trial("without A", 0, 0.6), trial("without A", 1, 0.8)],
    }
    report = comparison_report(Comparison("r", "test/accuracy", trials))
    difference = report.data["variants"]["without A"]["metrics"]["test/accuracy"]["difference"]
    assert difference["mean"] == pytest.approx(-0.1)
    assert difference["std"] == pytest.approx(0, abs=1e-9)  # though each variant spreads by 0.14
    report.save(tmp_path)
    assert "70.0 ± 14.1 %" in (tmp_path / "report.md").read_text()


def logged(
    losses: list[float], *, flops: float = 1e12, seconds: float = 10.0, name: str = "val/loss"
) -> dict[str, list[CurvePoint]]:
    """A run that was validated after equal shares of what it cost in all."""
    share = [(place + 1) / len(losses) for place in range(len(losses))]
    columns = {name: losses, "peft/flops": [flops * x for x in share], "peft/seconds": [seconds * x for x in share]}
    return {column: [CurvePoint(step, None, value) for step, value in enumerate(values)] for column, values in columns.items()}


def grown(curves: dict[str, list[dict[str, list[CurvePoint]]]], monitor: str = "test/accuracy") -> Comparison:
    trials = {label: [trial(label, seed, 0.5) for seed in range(len(seeds))] for label, seeds in curves.items()}
    for label, mine in trials.items():
        for one in mine:
            one.methods = [] if label == "dense" else [{"method": "Growth", "name": "growth", "config": {}}]
            one.flops = 2.5e15
    return Comparison("r", monitor, trials, curves=curves)


def test_what_each_variant_spent_until_it_was_as_good_as_the_dense_run(tmp_path) -> None:
    curves = {
        "full": [logged([4, 2, 1], flops=9e11, seconds=6), logged([4, 3, 2], flops=9e11, seconds=6)],
        "without Growth": [logged([4, math.nan, 1]), logged([5, 4, 3.5])],
        "without Other": [logged([9, 8]), logged([9, 8])],
        "dense": [logged([4, 3, 2]), logged([4, 2, 3])],
    }
    report = comparison_report(grown(curves))
    reach = report.data["reach"]
    assert (reach["reference"], reach["levels"]) == ("dense", [2, 2])  # the best it had, not the last
    flops = {label: costs["flops"] for label, costs in reach["variants"].items()}
    assert list(flops) == ["dense", "full", "without Growth", "without Other"]
    assert flops["dense"]["to_reach"] == pytest.approx([1e12, 2e12 / 3])
    assert flops["full"]["to_reach"] == pytest.approx([6e11, 9e11])
    assert flops["full"]["ratio"]["low"] == pytest.approx(0.6)
    assert flops["full"]["ratio"]["mean"] == pytest.approx((0.6 + 1.35) / 2)
    assert flops["without Growth"]["to_reach"] == [pytest.approx(1e12 * (1 / 3 + 2 / 3 * 2 / 3)), None]
    assert flops["without Other"] == {**flops["without Other"], "to_reach": [None, None], "ratio": None}
    assert reach["variants"]["full"]["seconds"]["to_reach"] == pytest.approx([4, 6])
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| full | 2 of 2 | 750 GFLOP | 0.98 | 0.60 to 1.35 |" in text
    assert "| without Growth | 1 of 2 |" in text
    assert "| without Other | never |" in text
    assert "| full | 2 of 2 | 5.0 s | 0.65 | 0.40 to 0.90 |" in text
    assert "2.50 PFLOP" in text
    assert (
        json.loads((tmp_path / "report.json").read_text())["reach"]["variants"]["without Growth"]["flops"]["to_reach"][1]
        is None
    )


def test_a_metric_that_rises_is_reached_from_below() -> None:
    name = "val/accuracy"
    curves = {"full": [logged([0.5, 0.9], name=name)], "without A": [logged([0.2, 0.6], name=name)]}
    reach = grown(curves).reach()
    assert reach is not None
    assert (reach.metric, reach.reference, reach.levels()) == (name, "full", [0.9])  # no run without methods: the first
    assert reach.spent("without A", "peft/flops") == [None]
    assert "Accuracy against FLOPs" in [section.title for section in comparison_report(grown(curves)).sections]


def test_without_curves_of_two_variants_there_is_nothing_to_reach() -> None:
    assert grown({"full": [logged([3, 2])], "dense": [{}]}).reach() is None
    assert grown({"full": [{}], "dense": [logged([3, 2])]}).reach() is None
    assert grown({"full": [logged([3, 2])], "dense": [logged([math.nan])]}).reach() is None
    assert grown({"full": [logged([3, 2], name="val/other")], "dense": [logged([3, 2], name="val/other")]}).reach() is None
    assert comparison_report(Comparison("r", "test/accuracy", {"full": [trial("full", 0, 0.7)]})).data.get("reach") is None
    # A seed that was trained before FLOPs were counted is left out.
    reach = grown({"full": [{}, logged([3, 1])], "dense": [logged([3, 2]), logged([3, 2])]}).reach()
    assert reach is not None
    assert reach.spent("full", "peft/flops") == [None, 7.5e11]
    assert reach.ratios("full", "peft/flops") == [0.75]

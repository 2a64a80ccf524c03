"""The report of a recipe: the composed run beside its dense baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from lightning_peft.baking.nm_proof import NMProof
from lightning_peft.measure.flop_meter import FLOPS
from lightning_peft.report import plots as plots
from lightning_peft.report.calibration import WHY_SEVERAL, calibration_errors_table
from lightning_peft.report.contents import Fact, Figure, Section, Table, number
from lightning_peft.report.curves import Curve, Curves, first_logged, over_cost, over_epochs, over_steps
from lightning_peft.report.learnt import learnt_section
from lightning_peft.report.proof import proof_data, proof_fact, proof_section
from lightning_peft.report.report import Report
from lightning_peft.report.trial import (
    Trial,
    duration,
    flop_text,
    flop_unit,
    lower_is_better,
    short,
    show,
    show_difference,
)
from lightning_peft.report.weights import Weights
from lightning_peft.report.weights_section import weights_section


@dataclass(frozen=True)
class RunEvidence:
    """All a run's report is made of.

    Attributes:
        name: Name of the recipe.
        summary: Its one sentence.
        monitor: The test metric it is about.
        composed: The run with all methods.
        dense: The same without them.
        weights: Weights of the composed run's checkpoint.
        proofs: N:M proof of its layers.
        curves: Logged numbers of each run by its name.
        loading: Lines of Python that load the trained network.
        loading_note: What to say about them.
        command: Command that made it.
    """

    name: str
    summary: str
    monitor: str
    composed: Trial
    weights: Weights
    dense: Trial | None = None
    proofs: list[NMProof] = field(default_factory=list)
    curves: Mapping[str, Curves] = field(default_factory=dict)
    loading: tuple[str, ...] = ()
    loading_note: str = ""
    command: str = ""

    @property
    def trials(self) -> list[Trial]:
        """The runs, baseline first."""
        return [trial for trial in (self.dense, self.composed) if trial is not None]


def run_report(evidence: RunEvidence) -> Report:
    """Write the report of a recipe.

    Args:
        evidence: What was run.

    Returns:
        The report; ``save`` it.
    """
    composed = evidence.composed
    sections = [_outcome(evidence), _methods(composed)]
    if composed.plan:
        sections.append(
            Section("Plan", ("Methods in the order they act, whatever their order in the callbacks list.",), code=composed.plan)
        )
    if evidence.loading_note:
        sections.append(Section("Loading it", (evidence.loading_note,), code="\n".join(evidence.loading)))
    learnt = learnt_section({trial.name: [trial] for trial in evidence.trials})
    sections.extend(section for section in (_training(evidence), _calibration(evidence), learnt) if section is not None)
    if evidence.proofs:
        sections.append(proof_section(evidence.proofs))
    sections.append(weights_section(evidence.weights))
    names = ", ".join(method["method"] for method in composed.methods)
    return Report(
        title=evidence.name,
        subtitle=evidence.summary or (f"{names} composed on one module." if names else ""),
        facts=_facts(evidence),
        sections=tuple(sections),
        data=_data(evidence),
        made_by=evidence.command,
    )


def outcome_table(evidence: RunEvidence) -> Table:
    """Return dense against composed, a metric a row."""
    trials = evidence.trials
    names = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    names.sort(key=lambda name: (name != evidence.monitor, name))
    rows: list[tuple[str | None, ...]] = []
    for name in names:
        values = [trial.metrics.get(name) for trial in trials]
        row: list[str | None] = [name.replace("/", " "), *(show(name, value) for value in values)]
        if len(values) == 2:
            a, b = values
            row.append(show_difference(name, b - a) if a is not None and b is not None else "")
        rows.append(tuple(row))
    difference = ("",) if len(trials) == 2 else ()
    shares = [100 * trial.nonzero / max(trial.parameters, 1) for trial in trials]
    for head, costs in (("FLOPs a sample", [t.forward_flops for t in trials]), ("training FLOPs", [t.flops for t in trials])):
        if all(costs):
            rows.append((head, *(flop_text(cost) for cost in costs), *difference))
    rows.append(("parameters", *(number(trial.parameters) for trial in trials), *difference))
    rows.append(("non-zero parameters", *(number(trial.nonzero) for trial in trials), *difference))
    rows.append(("share of all parameters", *(f"{share:.1f} %" for share in shares), *difference))
    rows.append(("training", *(duration(trial.seconds) for trial in trials), *difference))
    heads = ("", *(trial.name for trial in trials), *(("difference",) if difference else ()))
    return Table(heads, tuple(rows))


def _outcome(evidence: RunEvidence) -> Section:
    composed = evidence.composed
    text = f"{composed.epochs} epochs, {composed.steps:,} optimizer steps, {composed.seed_text}."
    if evidence.dense is not None:
        text += " Dense is the same recipe, seed and data order with the methods left out."
    return Section("Outcome", (text, *composed.notes), (outcome_table(evidence),))


def _methods(trial: Trial) -> Section:
    rows = tuple(
        (
            method["method"],
            method["name"],
            ", ".join(f"{key}={value!r}" for key, value in method["config"].items() if value is not None),
        )
        for method in trial.methods
    )
    if not rows:
        return Section("Methods", ("None.",))
    return Section("Methods", (), (Table(("method", "name in logs", "arguments"), rows),))


def _facts(evidence: RunEvidence) -> tuple[Fact, ...]:
    composed, dense = evidence.composed, evidence.dense
    facts = _savings(composed, dense)
    ece = next((name for name in composed.metrics if short(name) == "ece"), None)
    for name in dict.fromkeys(name for name in (evidence.monitor, ece) if name in composed.metrics):
        assert name is not None
        value = composed.metrics[name]
        base = None if dense is None else dense.metrics.get(name)
        note, good = "", None
        if base is not None:
            note = f"dense {show(name, base)}, {show_difference(name, value - base)}"
            good = True if (value <= base if lower_is_better(name) else value >= base) else None
        facts.append(Fact(name.replace("/", " ").replace("ece", "calibration error"), show(name, value), note, good))
    mapped = evidence.weights.mapped
    if mapped:
        kept, total = sum(row.nonzero for row in mapped), sum(row.total for row in mapped)
        if kept < total:
            whole = f"{100 * evidence.weights.nonzero / max(evidence.weights.parameters, 1):.1f} % of all parameters"
            facts.append(Fact("weights kept in the targets", f"{100 * kept / total:.1f} %", f"{len(mapped)} layers; {whole}"))
    if evidence.proofs:
        facts.append(proof_fact(evidence.proofs))
    base_time = "" if dense is None else f"dense {duration(dense.seconds)}"
    facts.append(Fact("training time", duration(composed.seconds), base_time))
    return tuple(facts)


def _savings(composed: Trial, dense: Trial | None) -> list[Fact]:
    """Return the costs in which the runs differ, which is what a method that changes structure is for."""
    costs = (
        ("FLOPs a sample", composed.forward_flops, dense and dense.forward_flops, flop_text),
        ("parameters", composed.parameters, dense and dense.parameters, number),
        ("training FLOPs", composed.flops, dense and dense.flops, flop_text),
    )
    facts = []
    for label, own, other, text in costs:
        if not own or not other or abs(own - other) < 0.01 * other:
            continue
        change = f"{100 * abs(own - other) / other:.0f} % {'fewer' if own < other else 'more'}"
        facts.append(Fact(label, text(own), f"dense {text(other)}, {change}", own < other))
    return facts


def _training(evidence: RunEvidence) -> Section | None:
    figures = []
    runs = evidence.curves
    wanted = "val/" + short(evidence.monitor)
    score = first_logged(runs.values(), (wanted, wanted.replace("/", "_"), "val/loss", "val_loss"))
    panels: dict[str, dict[str, Curve]] = {}
    by_epoch = score is not None and all(_one_an_epoch(run, score) for run in runs.values())
    over = over_epochs if by_epoch else over_steps
    if score is not None:
        panels[score.replace("/", " ")] = _by_run(runs, score, over)
    val_loss = first_logged(runs.values(), ("val/loss", "val_loss"))
    if val_loss not in (None, score):
        assert val_loss is not None
        panels[val_loss.replace("/", " ")] = _by_run(runs, val_loss, over)
    if panels:
        figures.append(_validation(panels, by_epoch))
    figures[:0] = _cost(evidence, score)
    composed = runs.get(evidence.composed.name, {})
    losses = {
        name.rsplit("/", 1)[-1]: curve
        for name in sorted(composed)
        if name.startswith("peft/loss/") and (curve := over_steps(composed, name)) is not None
    }
    if losses:
        terms = {name: curve for name, curve in losses.items() if name not in ("base", "total")}
        both: dict[str, Curve] = {name: losses[name] for name in ("base", "total") if name in losses}
        shown: dict[str, dict[str, Curve]] = {"Training loss": both}
        if terms:
            shown["Terms the methods add"] = terms
        draw = partial(plots.lines, shown, "optimizer step")
        figures.append(
            Figure(
                "losses",
                "The loss the module returned (base) stays its own; what is optimised (total) is logged beside it.",
                draw,
            )
        )
    schedule = _schedules(composed)
    if schedule:
        draw = partial(plots.lines, schedule, "optimizer step")
        figures.append(Figure("schedules", "What each method reports of itself during training.", draw))
    return Section("Training", (), (), tuple(figures)) if figures else None


def _validation(panels: Mapping[str, Mapping[str, Curve]], by_epoch: bool) -> Figure:
    if by_epoch:
        draw = partial(plots.lines, panels, "epoch", integer=True)
        return Figure("curves", "Validation after each epoch, composed beside dense.", draw)
    return Figure(
        "curves", "Validation while it trained, composed beside dense.", partial(plots.lines, panels, "optimizer step")
    )


def _cost(evidence: RunEvidence, score: str | None) -> list[Figure]:
    """Return the validation metric over what was spent, where a step of one run costs more than a step of the other."""
    flops = [trial.flops for trial in evidence.trials]
    if score is None or len(flops) < 2 or not min(flops) or max(flops) < 1.01 * min(flops):
        return []
    scale, unit = flop_unit(max(flops))
    curves: dict[str, Curve] = {}
    for run, logged in evidence.curves.items():
        curve = over_cost(logged, score, FLOPS)
        if curve is not None:
            curves[run] = ([x / scale for x in curve[0]], curve[1])
    if not curves:
        return []
    draw = partial(plots.lines, {score.replace("/", " "): curves}, f"training FLOPs, {unit}")
    return [Figure("cost", "Validation over what training had cost until then, composed beside dense.", draw)]


def _one_an_epoch(curves: Curves, name: str) -> bool:
    epochs = [point.epoch for point in curves.get(name, [])]
    return len(set(epochs)) == len(epochs)


def _by_run(runs: Mapping[str, Curves], name: str, over: Callable[[Curves, str], Curve | None]) -> dict[str, Curve]:
    return {run: curve for run, curves in runs.items() if (curve := over(curves, name)) is not None}


def _schedules(curves: Curves) -> dict[str, dict[str, Curve]]:
    """Metrics of methods that moved, a panel a method, three panels at most."""
    panels: dict[str, dict[str, Curve]] = {}
    for name in sorted(curves):
        parts = name.split("/")
        curve = over_steps(curves, name)
        reported = len(parts) == 3 and parts[0] == "peft" and parts[1] != "loss"
        if reported and curve is not None and len(set(curve[1])) > 1:
            panels.setdefault(parts[1], {})[parts[2]] = curve
    return dict(list(panels.items())[:3])


def _calibration(evidence: RunEvidence) -> Section | None:
    models = {trial.name: trial.calibration for trial in evidence.trials if trial.calibration}
    if not models:
        return None
    text = [
        "Test samples in 15 bins by confidence. On the dashed line the model is right as often as it claims; below it, it is "
        "overconfident (Guo et al., ICML 2017)."
    ]
    judged = {trial.name: trial.calibration_errors for trial in evidence.trials if trial.calibration_errors}
    tables = (calibration_errors_table(judged),) if judged else ()
    if judged:
        text.append(WHY_SEVERAL)
    figure = Figure("reliability", "Reliability diagrams on the test data.", partial(plots.reliability, models))
    return Section("Calibration", tuple(text), tables, (figure,))


def _data(evidence: RunEvidence) -> dict[str, Any]:
    return {
        "recipe": evidence.name,
        "monitor": evidence.monitor,
        **{trial.name: asdict(trial) for trial in evidence.trials},
        "loading": list(evidence.loading),
        "loading_note": evidence.loading_note,
        "weights": evidence.weights.as_data(),
        "nm_proof": proof_data(evidence.proofs),
    }

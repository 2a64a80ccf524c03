"""The report of an ablation: variants of a recipe over several seeds, means with their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from lightning_peft.measure.calibration import mean_table
from lightning_peft.measure.spread import Spread as Spread
from lightning_peft.report import plots as plots
from lightning_peft.report.calibration import WHY_SEVERAL, calibration_errors_table
from lightning_peft.report.contents import Cell, Fact, Figure, Section, Table
from lightning_peft.report.curves import Curves
from lightning_peft.report.learnt import learnt_section
from lightning_peft.report.reach import Reach, reach_data, reach_section
from lightning_peft.report.report import Report
from lightning_peft.report.trial import Trial, duration, flop_text, is_share, lower_is_better, show, show_difference

Row = tuple[str | None, ...]


@dataclass(frozen=True)
class Comparison:
    """An ablation; the first variant is what the others are compared with.

    Attributes:
        name: Name of the recipe.
        monitor: The test metric it is about.
        trials: Trials of each variant, in the order of seeds.
        command: Command that made it.
        curves: What each trial logged, in the same order.
    """

    name: str
    monitor: str
    trials: Mapping[str, Sequence[Trial]]
    command: str = ""
    curves: Mapping[str, Sequence[Curves]] = field(default_factory=dict)

    def values(self, variant: str, metric: str) -> list[float]:
        """Return a metric of a variant for each seed that has it."""
        return [trial.metrics[metric] for trial in self.trials[variant] if metric in trial.metrics]

    def metrics(self) -> list[str]:
        """Return the metrics every variant has, the monitored one first."""
        every = [set(trial.metrics) for trials in self.trials.values() for trial in trials]
        shared = sorted(set.intersection(*every)) if every else []
        return sorted(shared, key=lambda name: (name != self.monitor, name))

    def paired(self, variant: str, metric: str) -> Spread:
        """Return the spread of the difference to the first variant, seed by seed."""
        reference = self.values(next(iter(self.trials)), metric)
        return Spread.of([b - a for a, b in zip(reference, self.values(variant, metric), strict=True)])

    def reach(self) -> Reach | None:
        """Return what each variant spent to reach that without methods, else the first; ``None`` where it is not known."""
        plain = (label for label, trials in self.trials.items() if not any(trial.methods for trial in trials))
        return Reach.of(self.curves, next(plain, next(iter(self.trials))), self.monitor)


def comparison_report(comparison: Comparison) -> Report:
    """Write the report of an ablation."""
    metrics, reach = comparison.metrics(), comparison.reach()
    seeds = len(next(iter(comparison.trials.values())))
    spread = "mean, standard deviation, lowest, highest" if seeds > 1 else "one training says nothing about spread"
    text = (
        f"{seeds} seed{'s' if seeds != 1 else ''} for each variant: {spread}. Differences to the full recipe are taken seed by "
        "seed, because a seed gives all variants the same data order.",
    )
    sections = (
        Section("Ablation", text, (cost_table(comparison),)),
        *(
            Section(
                metric.replace("/", " "),
                (),
                (metric_table(comparison, metric),),
                (
                    Figure(
                        f"compare-{metric.replace('/', '-')}",
                        "A dot a seed, a line from lowest to highest, a bar at the mean.",
                        partial(plots.spreads, _scaled(comparison, metric), f"{metric}{', %' if is_share(metric) else ''}"),
                    ),
                ),
            )
            for metric in metrics
        ),
        *([reach_section(reach)] if reach else []),
        *_calibration(comparison),
        *([learnt] if (learnt := learnt_section(comparison.trials)) else []),
        Section("Every training", (), (_every(comparison, metrics),)),
    )
    data = {
        "recipe": comparison.name,
        "monitor": comparison.monitor,
        "variants": {label: _summary(comparison, label, metrics) for label in comparison.trials},
        **({"reach": reach_data(reach)} if reach else {}),
    }
    facts = _facts(comparison, metrics)
    return Report(f"{comparison.name}: ablation", "", facts, sections, data, comparison.command)


def metric_table(comparison: Comparison, metric: str) -> Table:
    """Return the spread of one metric, a variant a row."""
    rows: list[Row] = []
    for index, label in enumerate(comparison.trials):
        spread = Spread.of(comparison.values(label, metric))
        difference = _difference(metric, comparison.paired(label, metric)) if index else ""
        rows.append((label, _mean(metric, spread), f"{show(metric, spread.low)} to {show(metric, spread.high)}", difference))
    return Table(("variant", metric.replace("/", " "), "lowest to highest", "difference to full"), tuple(rows))


def _calibration(comparison: Comparison) -> list[Section]:
    tables = {name: [trial.calibration_errors for trial in trials] for name, trials in comparison.trials.items()}
    judged = {name: mean_table(found) for name, found in tables.items() if all(found)}
    caption = "Mean over seeds, as it is to after a temperature"
    return [Section("Calibration", (WHY_SEVERAL,), (calibration_errors_table(judged, caption),))] if judged else []


def cost_table(comparison: Comparison) -> Table:
    """Return what each variant leaves non-zero, how long it trains and with how many FLOPs, a variant a row."""
    known = any(trial.flops for trials in comparison.trials.values() for trial in trials)
    rows = tuple(
        (
            label,
            _density(trials),
            duration(Spread.of([trial.seconds for trial in trials]).mean),
            *([_flops(trials)] if known else []),
        )
        for label, trials in comparison.trials.items()
    )
    return Table(("variant", "non-zero parameters", "training, mean", *(["training FLOPs, mean"] if known else [])), rows)


def _mean(metric: str, spread: Spread) -> str:
    return f"{spread.text(1, unit=100)} %" if is_share(metric) else spread.text(4)


def _difference(metric: str, spread: Spread) -> str:
    return spread.text(1, unit=100, sign="+") if is_share(metric) else spread.text(4, sign="+")


def _density(trials: Sequence[Trial]) -> str:
    kept, total = sum(trial.nonzero for trial in trials), sum(trial.parameters for trial in trials)
    return f"{100 * kept / max(total, 1):.1f} %"


def _flops(trials: Sequence[Trial]) -> str:
    """A trial from before they were counted has none."""
    known = [trial.flops for trial in trials if trial.flops]
    return flop_text(Spread.of(known).mean) if known else ""


def _scaled(comparison: Comparison, metric: str) -> dict[str, list[float]]:
    unit = 100 if is_share(metric) else 1
    return {label: [unit * value for value in comparison.values(label, metric)] for label in comparison.trials}


def _every(comparison: Comparison, metrics: Sequence[str]) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (label, trial.seed, *(show(metric, trial.metrics[metric]) for metric in metrics), duration(trial.seconds))
        for label, trials in comparison.trials.items()
        for trial in trials
    )
    count = f"All {len(rows)} trainings"
    return Table(
        ("variant", "seed", *(metric.replace("/", " ") for metric in metrics), "training"), rows, count, len(rows) > 12
    )


def _facts(comparison: Comparison, metrics: Sequence[str]) -> tuple[Fact, ...]:
    if comparison.monitor not in metrics:
        return ()
    metric = comparison.monitor
    facts = []
    for index, label in enumerate(comparison.trials):
        spread = Spread.of(comparison.values(label, metric))
        note = "" if not index else f"{show_difference(metric, comparison.paired(label, metric).mean)} to full"
        facts.append(Fact(label, _mean(metric, spread), note))
    return tuple(facts)


def _summary(comparison: Comparison, label: str, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "metrics": {
            metric: {
                **asdict(Spread.of(comparison.values(label, metric))),
                "difference": asdict(comparison.paired(label, metric)),
                "lower_is_better": lower_is_better(metric),
            }
            for metric in metrics
        },
        "trials": [asdict(trial) for trial in comparison.trials[label]],
    }

"""The report of an adaptation study: methods under shift, protocol by protocol, means over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

from lightning_peft.measure.calibration import mean_table
from lightning_peft.measure.confidence import MOST
from lightning_peft.report import plots as plots
from lightning_peft.report.calibration import WHY_SEVERAL, calibration_errors_table
from lightning_peft.report.comparison import Spread
from lightning_peft.report.contents import Cell, Fact, Figure, Section, Table
from lightning_peft.report.report import Report
from lightning_peft.shifts.record import EpisodeRecord, PartRecord
from lightning_peft.shifts.streams import PROTOCOLS

SOURCE = "source"


@dataclass(frozen=True)
class Study:
    """Records of one study; ``"source"`` is among the methods.

    Attributes:
        name: Name of the recipe.
        records: All episodes.
        command: Command that made it.
        notes: Remarks on data and source model.
    """

    name: str
    records: Sequence[EpisodeRecord]
    command: str = ""
    notes: tuple[str, ...] = ()

    def protocols(self) -> list[str]:
        """Protocols, in the order they were run."""
        return list(dict.fromkeys(record.protocol for record in self.records))

    def methods(self, protocol: str) -> list[str]:
        """Methods of a protocol, the source first."""
        return list(dict.fromkeys(record.method for record in self.records if record.protocol == protocol))

    def seeds(self, protocol: str) -> list[int]:
        """Seeds of a protocol."""
        return sorted({record.seed for record in self.records if record.protocol == protocol})

    def of(self, protocol: str, method: str, seed: int | None = None) -> list[EpisodeRecord]:
        """Episodes of a method, of one seed or all."""
        return [
            record
            for record in self.records
            if record.protocol == protocol and record.method == method and seed in (None, record.seed)
        ]

    def spread(self, protocol: str, method: str, number: Callable[[Sequence[EpisodeRecord]], float]) -> Spread:
        """Mean and spread over the seeds of a number of a seed's episodes."""
        return Spread.of([number(self.of(protocol, method, seed)) for seed in self.seeds(protocol)])


def error(records: Sequence[EpisodeRecord]) -> float:
    """Mean error over the shifted test sets, each counted alike."""
    return fmean(part.error for part in _parts(records))


def calibration_error(records: Sequence[EpisodeRecord]) -> float:
    """Mean calibration error over the shifted test sets."""
    return fmean(part.ece for part in _parts(records))


def clean_error(records: Sequence[EpisodeRecord]) -> float:
    """Mean error on the clean samples at the end of each episode."""
    return fmean(record.clean.error for record in records if record.clean is not None)


def forward_passes(records: Sequence[EpisodeRecord]) -> float:
    """Forward passes a sample."""
    return sum(record.forward for record in records) / sum(record.samples for record in records)


def backward_passes(records: Sequence[EpisodeRecord]) -> float:
    """Backward passes a sample."""
    return sum(record.backward for record in records) / sum(record.samples for record in records)


def milliseconds(records: Sequence[EpisodeRecord]) -> float:
    """Wall time a sample."""
    return 1000 * sum(record.seconds for record in records) / sum(record.samples for record in records)


def _parts(records: Sequence[EpisodeRecord]) -> list[PartRecord]:
    return [part for record in records for part in record.parts]


def adaptation_report(study: Study) -> Report:
    """Write the report of an adaptation study."""
    sections = []
    for protocol in study.protocols():
        seeds = len(study.seeds(protocol))
        text = (
            f"{PROTOCOLS[protocol].capitalize()}. {seeds} seed{'s: mean ± standard deviation' if seeds != 1 else ''}. A seed "
            "gives all methods the same stream.",
            *_calibration_text(study, protocol),
        )
        figures = [
            Figure(
                f"stream-{protocol}",
                "Error over the stream, mean over seeds, smoothed. The samples after the last line are clean."
                if protocol != "reset"
                else "Error on each shifted test set, mean over seeds.",
                partial(_draw_stream, study, protocol) if protocol != "reset" else partial(_draw_parts, study, protocol),
            ),
            Figure(
                f"error-{protocol}",
                "Mean error under shift. A dot a seed, a line from lowest to highest, a bar at the mean.",
                partial(plots.spreads, _errors(study, protocol), "error under shift, %"),
            ),
        ]
        tables = [method_table(study, protocol), cost_table(study, protocol), part_table(study, protocol)]
        judged = _calibration(study, protocol)
        if judged:
            caption = "Calibration of all answers under shift, mean over seeds, as it is to after a temperature"
            tables.insert(1, calibration_errors_table(judged, caption))
        sections.append(Section(protocol, text, tuple(tables), tuple(figures)))
    if study.notes:
        sections.append(Section("What was adapted to what", study.notes))
    data = {
        "recipe": study.name,
        "protocols": {protocol: _summary(study, protocol) for protocol in study.protocols()},
        "records": [asdict(record) for record in study.records],
    }
    return Report(f"{study.name}: adaptation", "", _facts(study), tuple(sections), data, study.command)


def method_table(study: Study, protocol: str) -> Table:
    """Return errors, calibration and forgetting, a method a row."""
    ends_clean = _ends_clean(study, protocol)
    rows: list[tuple[Cell, ...]] = []
    for method in study.methods(protocol):
        row: list[Cell] = [method, *(_percent(study.spread(protocol, method, n)) for n in (error, calibration_error))]
        if ends_clean:
            lost = _forgetting(study, protocol, method)
            row += [
                _percent(study.spread(protocol, method, clean_error)),
                "" if lost is None else lost.text(1, unit=100, sign="+"),
            ]
        rows.append(tuple(row))
    columns = ("method", "error, %", "ECE, %", *(("clean after, %", "forgets") if ends_clean else ()))
    caption = "Forgets: error on clean samples after the stream, less the source's, in points" if ends_clean else ""
    return Table(columns, tuple(rows), caption)


def _calibration(study: Study, protocol: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Calibration by every estimator, of the methods that have it for each of their episodes."""
    tables = {method: [record.calibration for record in study.of(protocol, method)] for method in study.methods(protocol)}
    return {method: mean_table(found) for method, found in tables.items() if all(found)}


def _calibration_text(study: Study, protocol: str) -> list[str]:
    judged, text = _calibration(study, protocol), []
    if judged:
        text.append(
            f"{WHY_SEVERAL} A temperature takes labels, which nobody has at test time; it shows how much of an error is one of "
            "scale. ECE in the first table is a mean over the test sets; the estimators judge a whole stream at once."
        )
    missing = [method for method in study.methods(protocol) if method not in judged]
    if missing:
        text.append(
            f"Not judged by every estimator: {', '.join(missing)}. Some of their episodes were recorded by an earlier version, "
            f"or have more than {MOST:,} logits. An episode whose file is deleted is run again."
        )
    return text


def cost_table(study: Study, protocol: str) -> Table:
    """Return passes through the network and time, a method a row."""
    baseline = study.of(protocol, SOURCE)
    rows = []
    for method in study.methods(protocol):
        records = study.of(protocol, method)
        cost = milliseconds(records)
        times = f"{cost / milliseconds(baseline):.1f}" if baseline else ""
        rows.append((method, f"{forward_passes(records):.2f}", f"{backward_passes(records):.2f}", f"{cost:.2f}", times))
    return Table(("method", "forward", "backward", "ms", "times source"), tuple(rows), "Passes and wall time a sample")


def _ends_clean(study: Study, protocol: str) -> bool:
    return all(record.clean is not None for record in study.records if record.protocol == protocol)


def part_table(study: Study, protocol: str) -> Table:
    """Return the mean error on each shifted test set, a method a row."""
    methods = study.methods(protocol)
    by_part = {method: _by_part(study.of(protocol, method)) for method in methods}
    parts = list(by_part[methods[0]])
    rows = tuple(
        (method, *(f"{100 * by_part[method][part]:.1f}" for part in parts), f"{100 * fmean(by_part[method].values()):.1f}")
        for method in methods
    )
    return Table(("method", *parts, "mean"), rows, "Error on each shifted test set, %", folded=len(parts) > 6)


def _by_part(records: Sequence[EpisodeRecord]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for part in _parts(records):
        found.setdefault(part.part, []).append(part.error)
    return {part: fmean(values) for part, values in found.items()}


def _forgetting(study: Study, protocol: str, method: str) -> Spread | None:
    if method == SOURCE or SOURCE not in study.methods(protocol):
        return None
    return Spread.of(
        [
            clean_error(study.of(protocol, method, seed)) - clean_error(study.of(protocol, SOURCE, seed))
            for seed in study.seeds(protocol)
        ]
    )


def _percent(spread: Spread) -> str:
    return spread.text(1, unit=100)


def _errors(study: Study, protocol: str) -> dict[str, list[float]]:
    return {
        method: [100 * error(study.of(protocol, method, seed)) for seed in study.seeds(protocol)]
        for method in study.methods(protocol)
    }


def _draw_stream(study: Study, protocol: str) -> Any:
    first = study.of(protocol, study.methods(protocol)[0])[0]
    names = [part.part for part in first.parts] if len(first.borders) == len(first.parts) + bool(first.clean) else []
    curves = {}
    for method in study.methods(protocol):
        records = study.of(protocol, method)
        mean = [100 * fmean(values) for values in zip(*(record.curve[1] for record in records), strict=True)]
        curves[method] = (records[0].curve[0], mean)
    return plots.stream(curves, first.borders, [*names, *(["clean"] if names and first.clean else [])])


def _draw_parts(study: Study, protocol: str) -> Any:
    methods = study.methods(protocol)
    return plots.grouped(
        {method: {part: 100 * value for part, value in _by_part(study.of(protocol, method)).items()} for method in methods},
        "error, %",
    )


def _facts(study: Study) -> tuple[Fact, ...]:
    facts = []
    for protocol in study.protocols():
        methods = study.methods(protocol)
        means: Mapping[str, float] = {method: study.spread(protocol, method, error).mean for method in methods}
        best = min(means, key=lambda method: means[method])
        note = "no method is better than the source" if best == SOURCE else ""
        if SOURCE in means and best != SOURCE:
            note = f"source {100 * means[SOURCE]:.1f} %"
        facts.append(Fact(protocol, f"{best} {100 * means[best]:.1f} %", note))
    return tuple(facts)


def _summary(study: Study, protocol: str) -> dict[str, Any]:
    judged = _calibration(study, protocol)
    numbers = {
        "error": error,
        "ece": calibration_error,
        "forward": forward_passes,
        "backward": backward_passes,
        "milliseconds": milliseconds,
    }
    if _ends_clean(study, protocol):
        numbers["clean_error"] = clean_error
    return {
        method: {
            **{name: asdict(study.spread(protocol, method, number)) for name, number in numbers.items()},
            "parts": _by_part(study.of(protocol, method)),
            "calibration": judged.get(method, {}),
        }
        for method in study.methods(protocol)
    }

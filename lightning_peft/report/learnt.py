"""The part of a report about what training changed: how far each matrix moved, in how many directions, and which are new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean, median

from lightning_peft.measure.spectra import THRESHOLD, TOP
from lightning_peft.measure.spread import Spread
from lightning_peft.measure.weight_changes import Learnt, WeightChange
from lightning_peft.report import learnt_plots as plots
from lightning_peft.report.contents import Cell, Figure, Section, Table
from lightning_peft.report.trial import Trial, duration

_FOLDED = 12
_MEANINGS = (
    "The change of a matrix is its value at the end less that at the start, which under a delta is the frozen weight; masks "
    "are not seen. Its size is the Frobenius norm, and its share of that before. The effective rank is the exponential of "
    "the entropy of the singular values' shares of their sum (Roy & Vetterli 2007), the stable rank the squared Frobenius norm "
    f"over the squared spectral norm. Intruders are those of the {TOP} leading left singular vectors of a trained matrix whose "
    f"cosine with each one from before is below {THRESHOLD} (Shuttleworth et al. 2024)."
)

Seeds = Mapping[str, Sequence[Learnt]]


def learnt_section(trials: Mapping[str, Sequence[Trial]]) -> Section | None:
    """Return the section, runs side by side.

    Args:
        trials: Trials of each run, one a seed; numbers are means over seeds.

    Returns:
        The section; ``None`` when nothing was measured.
    """
    found = {label: [Learnt.from_data(trial.learnt) for trial in mine] for label, mine in trials.items()}
    notes = sorted({f"{label}: {note}" for label, seeds in found.items() for one in seeds for note in one.notes})
    measured = {label: known for label, seeds in found.items() if (known := [one for one in seeds if one.rows])}
    if not measured:
        return Section("What was learnt", tuple(notes)) if notes else None
    took = fmean(one.seconds for seeds in measured.values() for one in seeds)
    text = (_MEANINGS, f"To find this out took {duration(took)} a training.", *notes)
    names = _names(measured)
    caption = "Change and its effective rank, matrix by matrix in the order of the network."
    draw = partial(plots.changes, names, {label: _curves(seeds, names) for label, seeds in measured.items()})
    tables = (summary_table(measured), _layer_table(measured, names))
    return Section("What was learnt", text, tables, (Figure("learnt", caption, draw),))


def summary_table(measured: Seeds) -> Table:
    """Return a run a row: medians over its matrices, and the intruders in all of them."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            label,
            len(seeds[0].rows),
            *(_median(seeds, name, digits, unit) for name, digits, unit in _MEDIANS),
            Spread.of([sum(_known(row.intruders for row in one.rows)) for one in seeds]).text(0 if len(seeds) == 1 else 1),
        )
        for label, seeds in measured.items()
    )
    heads = ("run", "matrices", "change, % of the norm", "effective rank", "stable rank", "intruders in all")
    several = any(len(seeds) > 1 for seeds in measured.values())
    return Table(heads, rows, f"Medians over matrices{', means over seeds' if several else ''}")


_MEDIANS = (("relative", 2, 100.0), ("effective_rank", 1, 1.0), ("stable_rank", 1, 1.0))


def _median(seeds: Sequence[Learnt], name: str, digits: int, unit: float) -> str:
    known = [found for one in seeds if (found := _known(getattr(row, name) for row in one.rows))]
    return Spread.of([median(found) for found in known]).text(digits, unit=unit) if known else ""


def _layer_table(measured: Seeds, names: Sequence[str]) -> Table:
    heads = [f"{label}: {what}" for label in measured for what in ("change", "ranks", "intruders")]
    shapes = {row.name: row.shape for seeds in measured.values() for one in seeds for row in one.rows}
    by_run = {label: _by_name(seeds) for label, seeds in measured.items()}
    rows = tuple(
        (
            name.removesuffix(".weight"),
            " x ".join(map(str, shapes[name])),
            *(cell for found in by_run.values() for cell in _cells(found.get(name, []))),
        )
        for name in names
    )
    caption = f"All {len(rows)} matrices: norm of the change and its share, effective and stable rank, intruders"
    return Table(("matrix", "shape", *heads), rows, caption, len(rows) > _FOLDED)


def _cells(rows: Sequence[WeightChange]) -> tuple[Cell, Cell, Cell]:
    """Write what several seeds did to one matrix."""
    if not rows:
        return "", "", ""
    relative, effective, stable, intruders = (
        _mean(getattr(row, name) for row in rows) for name in ("relative", "effective_rank", "stable_rank", "intruders")
    )
    size = f"{fmean(row.norm for row in rows):.3g}{'' if relative is None else f' ({100 * relative:.3g} %)'}"
    if effective is None or stable is None or intruders is None:
        return size, "", ""
    return size, f"{effective:.1f}, {stable:.1f}", f"{intruders:.{0 if len(rows) == 1 else 1}f}"


def _curves(seeds: Sequence[Learnt], names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Return mean share and mean effective rank of the matrices that have one above zero, each with its place."""
    found, curves = _by_name(seeds), {}
    for key in ("relative", "effective_rank"):
        means = [(place, _mean(getattr(row, key) for row in found.get(name, []))) for place, name in enumerate(names)]
        curves[key] = [(place, mean) for place, mean in means if mean]  # axes are logarithmic
    return curves


def _by_name(seeds: Sequence[Learnt]) -> dict[str, list[WeightChange]]:
    found: dict[str, list[WeightChange]] = {}
    for one in seeds:
        for row in one.rows:
            found.setdefault(row.name, []).append(row)
    return found


def _names(measured: Seeds) -> list[str]:
    """Names of all matrices in the order of the network, which the run that changed most knows best."""
    runs = sorted((one for seeds in measured.values() for one in seeds), key=lambda one: -len(one.rows))
    return list(dict.fromkeys(row.name for one in runs for row in one.rows))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return fmean(known) if known else None

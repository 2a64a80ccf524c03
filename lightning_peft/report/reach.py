"""Loss against compute: what each variant of a comparison spent until its validation loss was that of the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

from lightning_peft.measure.flop_meter import FLOPS, SECONDS
from lightning_peft.measure.spread import Spread
from lightning_peft.report import plots as plots
from lightning_peft.report.contents import Cell, Figure, Section, Table
from lightning_peft.report.curves import Curve, Curves, first_logged, flops_to_reach, over_cost
from lightning_peft.report.trial import duration, flop_text, flop_unit, lower_is_better, short, show

_NAMES = {FLOPS: "Training FLOPs", SECONDS: "Seconds"}


@dataclass(frozen=True)
class Reach:
    """Curves of all variants, and the one whose best validation the others are to reach, seed by seed.

    Attributes:
        metric: The validation metric.
        reference: The variant to be reached.
        curves: Logged numbers of each seed, by variant.
    """

    metric: str
    reference: str
    curves: Mapping[str, Sequence[Curves]]

    @classmethod
    def of(cls, curves: Mapping[str, Sequence[Curves]], reference: str, monitor: str) -> Reach | None:
        """Choose the metric: the validation loss, else the validation twin of the monitored test metric.

        Returns:
            ``None`` when no variant beside the reference logged it together with FLOPs.
        """
        names = ("val/loss", "val_loss", f"val/{short(monitor)}", f"val_{short(monitor).removeprefix('test_')}")
        metric = first_logged((seed for seeds in curves.values() for seed in seeds), names)
        if metric is None:
            return None
        known = {
            label: seeds for label, seeds in curves.items() if any(over_cost(seed, metric, FLOPS) is not None for seed in seeds)
        }
        if reference not in known or len(known) == 1:
            return None
        reach = cls(metric, reference, known)
        return reach if any(level is not None for level in reach.levels()) else None

    def costs(self) -> list[str]:
        """Return what was logged beside the metric: FLOPs, and seconds if there are any."""
        timed = any(over_cost(seed, self.metric, SECONDS) for seeds in self.curves.values() for seed in seeds)
        return [FLOPS, SECONDS] if timed else [FLOPS]

    def levels(self) -> list[float | None]:
        """Return the best value that the reference had, for each seed."""
        best = []
        for seed in self.curves[self.reference]:
            curve = over_cost(seed, self.metric, FLOPS)
            values = [self._sign * value for value in curve[1] if math.isfinite(value)] if curve else []
            best.append(self._sign * min(values) if values else None)
        return best

    def level(self) -> float:
        """Return their mean."""
        return fmean([level for level in self.levels() if level is not None])

    def spent(self, label: str, cost: str) -> list[float | None]:
        """Return what a variant spent until it reached the level of the same seed; ``None`` where it never did."""
        found: list[float | None] = []
        for seed, level in zip(self.curves[label], self.levels(), strict=False):
            curve = over_cost(seed, self.metric, cost)
            if curve is None or level is None:
                found.append(None)
                continue
            x, y = curve
            found.append(flops_to_reach((x, [self._sign * value for value in y]), self._sign * level))
        return found

    def ratios(self, label: str, cost: str) -> list[float]:
        """Return what a variant spent as a share of what the reference did, for the seeds in which it arrived."""
        pairs = zip(self.spent(label, cost), self.spent(self.reference, cost), strict=False)
        return [own / other for own, other in pairs if own is not None and other]

    def seeds(self, label: str, cost: str) -> list[Curve]:
        """Return the curve of each seed that has one."""
        return [curve for seed in self.curves[label] if (curve := over_cost(seed, self.metric, cost)) is not None]

    def labels(self) -> list[str]:
        """Return the variants, the reference first."""
        return [self.reference, *(label for label in self.curves if label != self.reference)]

    @property
    def _sign(self) -> int:
        """Curves are made to fall."""
        return 1 if lower_is_better(self.metric) else -1


def _plain(metric: str) -> str:
    return metric.replace("/", " ")


def reach_table(reach: Reach, cost: str) -> Table:
    """Return what each variant spent until it reached the reference, a variant a row."""
    text = flop_text if cost == FLOPS else duration
    rows: list[tuple[Cell, ...]] = []
    for label in reach.labels():
        spent, ratios = reach.spent(label, cost), reach.ratios(label, cost)
        there = [value for value in spent if value is not None]
        if not there or not ratios:
            rows.append((label, "never", "", "", ""))
            continue
        share = Spread.of(ratios)
        reached = f"{len(there)} of {len(spent)}"
        rows.append((label, reached, text(fmean(there)), f"{share.mean:.2f}", f"{share.low:.2f} to {share.high:.2f}"))
    caption = (
        f"{_NAMES[cost]} until {_plain(reach.metric)} is the best of {reach.reference}, {show(reach.metric, reach.level())}"
    )
    heads = ("variant", "seeds that reach it", "spent, mean", f"of {reach.reference}'s", "lowest to highest")
    return Table(heads, tuple(rows), caption)


def reach_tables(reach: Reach) -> tuple[Table, ...]:
    """Return a table for each cost."""
    return tuple(reach_table(reach, cost) for cost in reach.costs())


def reach_section(reach: Reach) -> Section:
    """Return the section of the report."""
    what = short(reach.metric).replace("_", " ")
    unit, name = flop_unit(max(x[-1] for label in reach.curves for x, _ in reach.seeds(label, FLOPS)))
    units = {FLOPS: (f"training FLOPs, {name}", unit), SECONDS: ("seconds, validation included", 1.0)}
    panels = {
        units[cost][0]: (units[cost][1], {label: reach.seeds(label, cost) for label in reach.labels()})
        for cost in reach.costs()
    }
    draw = partial(plots.races, panels, _plain(reach.metric), reach.level())
    text = (
        f"The best {_plain(reach.metric)} of {reach.reference} is the level that the others are to reach, seed by seed, on "
        "straight lines between validations; means are over the seeds that do. FLOPs are those of matrix products, "
        "convolutions and attention in the forward and backward passes of training. Elementwise work, the optimizer and "
        "validation are not in them, and a weight under a mask counts as if it were full.",
    )
    caption = f"A thin line a seed, a bold one their mean, dotted the best of {reach.reference}."
    return Section(
        f"{what[:1].upper()}{what[1:]} against FLOPs", text, reach_tables(reach), (Figure("compare-flops", caption, draw),)
    )


def reach_data(reach: Reach) -> dict[str, Any]:
    """Return the same in numbers."""
    return {
        "metric": reach.metric,
        "reference": reach.reference,
        "levels": reach.levels(),
        "variants": {
            label: {
                short(cost): {
                    "to_reach": reach.spent(label, cost),
                    "ratio": asdict(Spread.of(ratios)) if (ratios := reach.ratios(label, cost)) else None,
                    "curves": [{short(cost): x, reach.metric: y} for x, y in reach.seeds(label, cost)],
                }
                for cost in reach.costs()
            }
            for label in reach.labels()
        },
    }

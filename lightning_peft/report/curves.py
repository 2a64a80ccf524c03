"""Logged numbers over time, read back from the CSV files a run wrote, resumed runs included."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class CurvePoint:
    """One logged value."""

    step: int
    epoch: float | None
    value: float


Curves = Mapping[str, list[CurvePoint]]


def read_curves(folder: Path) -> dict[str, list[CurvePoint]]:
    """Read every ``metrics.csv`` below a folder and join them.

    A run that was killed and resumed leaves one file a session; where two sessions logged one step, the later one counts.

    Args:
        folder: Folder of a Lightning ``CSVLogger``.

    Returns:
        Points of each metric in the order of steps.
    """
    joined: dict[str, dict[int, CurvePoint]] = {}
    for path in sorted(folder.rglob("metrics.csv"), key=_version):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(float(row["step"]))
                epoch = float(row["epoch"]) if row.get("epoch") else None
                for name, text in row.items():
                    if name not in ("step", "epoch") and text:
                        joined.setdefault(name, {})[step] = CurvePoint(step, epoch, float(text))
    return {name: [points[step] for step in sorted(points)] for name, points in joined.items()}


def _version(path: Path) -> int:
    digits = path.parent.name.removeprefix("version_")
    return int(digits) if digits.isdigit() else 0


def over_steps(curves: Curves, name: str) -> Curve | None:
    """Return a metric over optimizer steps; ``None`` when it was not logged."""
    points = curves.get(name, [])
    return ([point.step for point in points], [point.value for point in points]) if points else None


def over_epochs(curves: Curves, name: str) -> Curve | None:
    """Return a metric over epochs, counted from 1; ``None`` when it was not logged with an epoch."""
    points = [point for point in curves.get(name, []) if point.epoch is not None]
    return ([(point.epoch or 0) + 1 for point in points], [point.value for point in points]) if points else None


def over_cost(curves: Curves, name: str, cost: str) -> Curve | None:
    """Return a metric over a second one that was logged at the same steps; ``None`` when there is no such step.

    Example:
        >>> flops, loss = [CurvePoint(1, 0, 5.0), CurvePoint(2, 0, 9.0)], [CurvePoint(0, 0, 3.0), CurvePoint(2, 0, 1.0)]
        >>> curves = {"flops": flops, "loss": loss}
        >>> over_cost(curves, "loss", "flops")
        ([9.0], [1.0])
    """
    spent = {point.step: point.value for point in curves.get(cost, [])}
    points = [(spent[point.step], point.value) for point in curves.get(name, []) if point.step in spent]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def flops_to_reach(curve: Curve, level: float) -> float | None:
    """Return where a falling curve first comes down to a level, on straight lines between its points.

    Args:
        curve: FLOPs (or seconds, or whatever was spent) and the loss there; points that are not finite are left out.
        level: The loss to reach.

    Returns:
        What was spent until then, ``None`` when it never was. A curve that starts below the level was there by its first
        point: what happened before is not known.

    Example:
        >>> flops_to_reach(([1.0, 2.0, 3.0], [4.0, 2.0, 1.0]), 3.0)
        1.5
        >>> flops_to_reach(([1.0, 2.0, 3.0], [4.0, math.nan, 1.0]), 2.5), flops_to_reach(([1.0], [2.0]), 2.0)
        (2.0, 1.0)
        >>> print(flops_to_reach(([1.0, 2.0], [4.0, 2.0]), 1.0), flops_to_reach(([1.0], [2.0]), math.nan))
        None None
    """
    before: tuple[float, float] | None = None
    for x, y in zip(*curve, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        if y <= level:
            return x if before is None else before[0] + (x - before[0]) * (before[1] - level) / (before[1] - y)
        before = (x, y)
    return None


def mean_curve(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Curve:
    """Average curves point by point, up to the end of the shortest: the first validation of each seed, the second, ...

    Example:
        >>> mean_curve([([1.0, 2.0], [4.0, 2.0]), ([3.0], [2.0])])
        ([2.0], [3.0])
    """
    points = [list(zip(x, y, strict=True)) for x, y in curves]
    pairs = [tuple(map(fmean, zip(*at, strict=True))) for at in zip(*points, strict=False)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def first_logged(curves: Iterable[Curves], candidates: Iterable[str]) -> str | None:
    """Return the first of the candidate names that any of the runs logged."""
    curves = list(curves)
    return next((name for name in candidates if any(name in run for run in curves)), None)

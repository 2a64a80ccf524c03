"""Logged numbers over time, read back from the CSV files a run wrote, resumed runs included."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Point:
    """One logged value."""

    step: int
    epoch: float | None
    value: float


Curves = Mapping[str, list[Point]]


def read_curves(folder: Path) -> dict[str, list[Point]]:
    """Read every ``metrics.csv`` below a folder and join them.

    A run that was killed and resumed leaves one file a session; where two sessions logged one step, the later one counts.

    Args:
        folder: Folder of a Lightning ``CSVLogger``.

    Returns:
        Points of each metric in the order of steps.
    """
    joined: dict[str, dict[int, Point]] = {}
    for path in sorted(folder.rglob("metrics.csv"), key=_version):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(float(row["step"]))
                epoch = float(row["epoch"]) if row.get("epoch") else None
                for name, text in row.items():
                    if name not in ("step", "epoch") and text:
                        joined.setdefault(name, {})[step] = Point(step, epoch, float(text))
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


def first_logged(curves: Iterable[Curves], candidates: Iterable[str]) -> str | None:
    """Return the first of the candidate names that any of the runs logged."""
    curves = list(curves)
    return next((name for name in candidates if any(name in run for run in curves)), None)

"""Plots of a deployment report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_peft.measure.clock import Latency
from lightning_peft.report.plots import canvas
from lightning_peft.report.trial import flop_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MOST_LAYERS = 40


def layer_flops(rows: Sequence[tuple[str, float, float]], names: tuple[str, str]) -> Canvas:
    """Draw FLOPs of each layer as two bars.

    Args:
        rows: Layer, FLOPs before, FLOPs after.
        names: Labels of the two.
    """
    figure, (axis,) = canvas(1, height=max(2.6, 0.27 * len(rows) + 1.1))
    scale, unit = flop_unit(max(max(row[1:]) for row in rows))
    places = list(range(len(rows)))[::-1]
    axis.barh([place + 0.19 for place in places], [row[1] / scale for row in rows], 0.36, color="0.62", label=names[0])
    axis.barh([place - 0.19 for place in places], [row[2] / scale for row in rows], 0.36, color="C0", label=names[1])
    axis.set_yticks(places, [row[0] for row in rows], fontsize=7.5 if len(rows) > 24 else 9)
    axis.set(xlabel=f"{unit} a call", ylim=(-0.7, len(rows) - 0.3))
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def latencies(panels: Mapping[str, Mapping[str, Latency]]) -> Canvas:
    """Draw every timed call as a dot, with a box from quartile to quartile and a bar at the median.

    Calls far outside of their box, which waited for something else on the machine, are only counted, at the right edge.

    Args:
        panels: Calls by label, by panel title; the first label is drawn in grey.
    """
    figure, axes = canvas(len(panels), height=2.5)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        limit = 1.1e3 * min(max(map(_whisker, rows.values())), max(max(latency.seconds) for latency in rows.values()))
        for place, (index, latency) in zip(range(len(rows))[::-1], enumerate(rows.values()), strict=True):
            color = "gray" if index == 0 else f"C{index - 1}"
            values = [1e3 * seconds for seconds in latency.seconds]
            heights = [place + 0.26 * ((7 * call % 11) / 5 - 1) for call in range(len(values))]  # apart, but not at random
            low, high = (1e3 * seconds for seconds in latency.quartiles)
            axis.barh(place, high - low, 0.62, left=low, color=color, alpha=0.25)
            axis.plot(values, heights, "o", color=color, markersize=3, alpha=0.65, markeredgewidth=0)
            axis.plot([1e3 * latency.median] * 2, [place - 0.36, place + 0.36], color=color, linewidth=2.6)
            if outside := sum(value > limit for value in values):
                axis.text(limit, place - 0.48, f"{outside} slower", color=color, ha="right", va="center", fontsize=8)
        axis.set(title=title, xlabel="milliseconds a call", xlim=(0, limit), ylim=(-0.6, len(rows) - 0.4))
        axis.set_yticks(range(len(rows)), list(rows)[::-1])
        axis.grid(axis="y", visible=False)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    return figure


def _whisker(latency: Latency) -> float:
    low, high = latency.quartiles
    return high + 1.5 * (high - low)

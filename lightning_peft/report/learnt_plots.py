"""The plot of what training changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_peft.report.plots import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_NAMED = 16  # more names than that do not fit below two panels

Points = Sequence[tuple[int, float]]


def changes(names: Sequence[str], runs: Mapping[str, Mapping[str, Points]]) -> Canvas:
    """Draw the share that each matrix changed by, and the effective rank of that change, runs side by side.

    Args:
        names: Matrices in the order of the network.
        runs: For each run its points, place and value above zero, under ``"relative"`` and ``"effective_rank"``.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = canvas(2, height=3.6 if len(names) <= _NAMED else 3.0)
    panels = (("relative", "Change, % of the norm", 100.0), ("effective_rank", "Effective rank of the change", 1.0))
    for axis, (key, title, unit) in zip(axes, panels, strict=True):
        for index, (label, points) in enumerate(runs.items()):
            x, y = [place for place, _ in points[key]], [unit * value for _, value in points[key]]
            axis.plot(x, y, "os^Dv"[index % 5], label=label, color=f"C{index % 6}", markersize=4.5, alpha=0.85)
        axis.set(title=title, xlim=(-0.7, len(names) - 0.3))
        if len(names) <= _NAMED:
            axis.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], rotation=38, ha="right")
        else:
            axis.set(xlabel="matrix, in the order of the network")
        if any(points[key] for points in runs.values()):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].legend()
    return figure

"""Plots of a report, each in a light and a dark theme. matplotlib is optional: without it there are none."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_peft.report.curves import mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from lightning_peft.report.contents import Figure

Curve = tuple[Sequence[float], Sequence[float]]

# Okabe and Ito's palette, lighter for dark paper: told apart by readers of all kinds of colour vision.
_PALETTES = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9"),
    "dark": ("#6CB8E6", "#F0915A", "#4CC9A0", "#E3A3C6", "#D8BE4A", "#A9D7F2"),
}
_INKS = {"light": ("#ffffff", "#1d2127", "#5d6570", "#e2dfd8"), "dark": ("#1c2026", "#e6e4df", "#9aa2ad", "#30363e")}


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def style(theme: str) -> dict[str, Any]:
    """Return matplotlib settings for ``"light"`` or ``"dark"`` paper."""
    from cycler import cycler

    paper, ink, soft, line = _INKS[theme]
    return {
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.facecolor": paper,
        "axes.edgecolor": line,
        "axes.labelcolor": soft,
        "axes.titlecolor": ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=_PALETTES[theme]),
        "grid.color": line,
        "grid.linewidth": 0.7,
        "text.color": ink,
        "xtick.color": soft,
        "ytick.color": soft,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.9,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.family": "sans-serif",
        "figure.constrained_layout.use": True,
        "savefig.dpi": 170,
    }


def render(figures: Iterable[Figure]) -> dict[str, dict[str, bytes]]:
    """Draw figures as PNG bytes by name and theme; nothing without matplotlib."""
    figures = list(figures)
    if not figures or not available():
        return {}
    import matplotlib as mpl

    images: dict[str, dict[str, bytes]] = {}
    for theme in _PALETTES:
        with mpl.rc_context(style(theme)):
            for figure in figures:
                buffer = io.BytesIO()
                figure.draw().savefig(buffer, format="png")
                images.setdefault(figure.name, {})[theme] = buffer.getvalue()
    return images


def canvas(columns: int = 1, height: float = 3.2) -> tuple[Canvas, list[Axes]]:
    """Return a figure of the report's width that no global state of pyplot knows, and its axes, side by side."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(10, height))
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def lines(panels: Mapping[str, Mapping[str, Curve]], xlabel: str, *, integer: bool = False) -> Canvas:
    """Draw curves in panels side by side.

    Args:
        panels: Curves by label, by panel title.
        xlabel: Label of the horizontal axis.
        integer: Ticks at whole numbers only, for epochs.
    """
    figure, axes = canvas(len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for label, (x, y) in curves.items():
            axis.plot(x, y, label=label, marker="o" if len(x) <= 30 else None, markersize=3.8)
        axis.set(title=title, xlabel=xlabel)
        if integer:
            from matplotlib.ticker import MaxNLocator

            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    return figure


def races(panels: Mapping[str, tuple[float, Mapping[str, Sequence[Curve]]]], ylabel: str, level: float) -> Canvas:
    """Draw the same metric over several costs side by side: thin lines for seeds, a bold one for their mean.

    Args:
        panels: By label of the horizontal axis, how many one unit of it is, and the curves of each seed by label. The first
            label is the reference and drawn in grey.
        ylabel: Label of the vertical axis.
        level: A value to mark, that which the reference reached.
    """
    figure, axes = canvas(len(panels), height=3.9)
    for axis, (xlabel, (unit, rows)) in zip(axes, panels.items(), strict=True):
        axis.axhline(level, color="gray", linewidth=1, linestyle=(0, (1.5, 2.5)))
        for index, (label, seeds) in enumerate(rows.items()):
            color = "gray" if index == 0 else f"C{(index - 1) % 6}"
            dashes = "-" if index <= 6 else (0, (4, 1.5))
            scaled = [([value / unit for value in x], y) for x, y in seeds]
            for x, y in scaled if len(scaled) > 1 else []:
                axis.plot(x, y, color=color, linewidth=0.8, alpha=0.4)
            x, y = mean_curve(scaled)
            mark = "o" if len(x) <= 30 else None
            axis.plot(x, y, label=label, color=color, linestyle=dashes, linewidth=2.4, marker=mark, markersize=3.8)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.set_xlim(left=0)
        curves = [curve for seeds in rows.values() for curve in seeds]
        low, high = _settled(curves, level)
        room = 0.05 * (high - low) or 0.1
        axis.set_ylim(low - room, high + room)
    for axis in axes[1:]:
        axis.sharey(axes[0])
        axis.label_outer()
    axes[-1].legend()
    return figure


def _settled(curves: Sequence[Curve], level: float) -> tuple[float, float]:
    """Return the range of curves and a level, without the first twentieth: there a loss falls from where it hides the rest."""
    end = max(x[-1] for x, _ in curves)
    late = [value for x, y in curves for at, value in zip(x, y, strict=True) if at >= end / 20 and math.isfinite(value)]
    return min([level, *late]), max([level, *late])


def reliability(models: Mapping[str, Sequence[tuple[float, float, float]]]) -> Canvas:
    """Draw reliability diagrams side by side.

    Args:
        models: For each model its bins: mean confidence, accuracy, share of the samples.
    """
    figure, axes = canvas(len(models), height=3.9)
    for index, (axis, (name, bins)) in enumerate(zip(axes, models.items(), strict=True)):
        width = 1 / max(len(bins), 1)
        color = f"C{index}"
        left = [number * width for number in range(len(bins))]
        filled = [(x, *values) for x, values in zip(left, bins, strict=True) if values[2] > 0]
        axis.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), linewidth=1, color="gray")
        axis.bar(
            [x for x, *_ in filled],
            [row[2] for row in filled],
            width * 0.92,
            align="edge",
            color=color,
            alpha=0.85,
            label="accuracy",
        )
        axis.bar(
            left, [share for *_, share in bins], width * 0.92, align="edge", color="gray", alpha=0.45, label="share of samples"
        )
        axis.set(title=name, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, handlelength=1.4, columnspacing=1.2)
    return figure


def densities(layers: Sequence[tuple[str, float, bool]]) -> Canvas:
    """Draw the density of each layer as horizontal bars.

    Args:
        layers: Name, share of non-zero weights, whether a method made it sparse.
    """
    figure, (axis,) = canvas(1, height=max(2.4, 0.17 * len(layers) + 0.9))
    places = {name: len(layers) - 1 - index for index, (name, *_) in enumerate(layers)}
    for label, color, wanted in (("under a method", "C0", True), ("untouched", "gray", False)):
        chosen = [(places[name], density) for name, density, mapped in layers if mapped == wanted]
        if chosen:
            axis.barh([place for place, _ in chosen], [value for _, value in chosen], color=color, height=0.7, label=label)
    axis.set(title="Non-zero share of each weight", xlim=(0, 1), ylim=(-0.8, len(layers) - 0.2))
    axis.set_yticks(list(places.values()), list(places), fontsize=7.5 if len(layers) > 24 else 9)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def histogram(edges: Sequence[float], before: Sequence[int], after: Sequence[int]) -> Canvas:
    """Draw how weights are spread as the optimizer stores them and as the baked network has them, zeros left out."""
    figure, (axis,) = canvas(1, height=2.9)
    axis.stairs(before, edges, fill=True, alpha=0.35, color="C0", label="stored, before the maps")
    axis.stairs(after, edges, linewidth=1.7, color="C1", label="baked, zeros left out")
    axis.set(title="Weights under a method", xlabel="weight", ylabel="count")
    axis.legend()
    return figure


def spreads(rows: Mapping[str, Sequence[float]], title: str) -> Canvas:
    """Draw one row a variant: a dot for each seed, a line from lowest to highest, a bar at the mean."""
    figure, (axis,) = canvas(1, height=0.55 * len(rows) + 1.2)
    for place, (index, values) in zip(range(len(rows))[::-1], enumerate(rows.values()), strict=True):
        color = f"C{min(index, 1)}"
        axis.plot([min(values), max(values)], [place, place], color=color, linewidth=1.4, alpha=0.6)
        axis.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.75)
        axis.plot(sum(values) / len(values), place, "|", color=color, markersize=19, markeredgewidth=2.6)
    axis.set_yticks(range(len(rows)), list(rows)[::-1])
    axis.set(title=title, ylim=(-0.6, len(rows) - 0.4))
    axis.grid(axis="y", visible=False)
    return figure


def stream(curves: Mapping[str, Curve], borders: Sequence[int], names: Sequence[str]) -> Canvas:
    """Draw errors over a stream.

    Args:
        curves: Samples seen and error, by label; the first is the reference and drawn in grey.
        borders: Samples seen at the end of each segment.
        names: Names of the segments, or none.
    """
    figure, (axis,) = canvas(1, height=4.2 if names else 3.6)
    for index, (label, (x, y)) in enumerate(curves.items()):
        # Beyond six methods colours repeat, and the dashes tell.
        dashes = "-" if index <= 6 else (0, (4, 1.5))
        color = "gray" if index == 0 else f"C{(index - 1) % 6}"
        axis.plot(x, smooth(y), label=label, color=color, linestyle=dashes, linewidth=1.5)
    for border in borders[:-1]:
        axis.axvline(border, color="gray", linewidth=0.6, alpha=0.5)
    if names:
        middles = [(start + end) / 2 for start, end in zip([0, *borders[:-1]], borders, strict=True)]
        top = axis.secondary_xaxis("top")
        top.set_xticks(middles, names, rotation=38, ha="left", fontsize=8)
        top.tick_params(length=0)
    axis.set(xlabel="samples seen", ylabel="error, %", xlim=(0, borders[-1]))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """Average every value with its neighbours, up to ``reach`` on each side.

    Example:
        >>> smooth([0.0, 3.0, 0.0], reach=1)
        [1.5, 1.0, 1.5]
    """
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def grouped(rows: Mapping[str, Mapping[str, float]], ylabel: str) -> Canvas:
    """Draw a mark for every row at every column, so that rows can be compared column by column.

    Args:
        rows: For each label its values by column; the first is the reference and drawn in grey.
        ylabel: Label of the vertical axis.
    """
    columns = list(next(iter(rows.values())))
    figure, (axis,) = canvas(1, height=4.2)
    for index, (label, values) in enumerate(rows.items()):
        color = "gray" if index == 0 else f"C{(index - 1) % 6}"
        shift = (index - (len(rows) - 1) / 2) * 0.7 / max(1, len(rows))
        places = [place + shift for place in range(len(columns))]
        axis.plot(
            places,
            [values[column] for column in columns],
            "_" if index == 0 else "os^Dv"[index % 5],
            label=label,
            color=color,
            markersize=9 if index == 0 else 5,
        )
    axis.set_xticks(range(len(columns)), columns, rotation=38, ha="right")
    axis.set(ylabel=ylabel)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure

"""Draws studies of deltas side by side: a dot a seed, a line at the mean, the best member on top.

python benchmarks/deltas_figure.py docs/evidence/deltas_{stories,reviews,groceries}.json --output docs/evidence/deltas_study.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from methods import STUDIES, Results


def draw(axis: Axes, name: str, results: Results) -> None:
    """Draw one study, with the number of trained parameters beside each row."""
    key, label, scale = STUDIES[name].columns[0]
    points = {variant: [scale * run[key] for run in runs.values()] for variant, runs in results.items()}
    best_first = sorted(points, key=lambda variant: statistics.mean(points[variant]), reverse="accuracy" in key)
    for row, variant in enumerate(best_first):
        values = points[variant]
        axis.plot(values, [row] * len(values), "o", color="C0", alpha=0.5, markeredgewidth=0)
        axis.plot([statistics.mean(values)] * 2, [row - 0.32, row + 0.32], color="black", linewidth=2)
        count = next(iter(results[variant].values()))["trainables"] / 1e3
        text = f"{count:,.0f} k" if count >= 10 else f"{count:.1f} k"
        axis.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="0.4")
    axis.set_title(STUDIES[name].setting, fontsize=9)
    axis.set_xlabel(label)
    axis.set_yticks(range(len(best_first)), best_first, fontsize=8)
    axis.set_ylim(len(best_first) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Read the results and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what methods.py wrote, named as its study")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(args.results), figsize=(5 * len(args.results), 8), layout="constrained", squeeze=False)
    for axis, path in zip(axes[0], args.results, strict=True):
        draw(axis, path.stem, json.loads(path.read_text()))
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()

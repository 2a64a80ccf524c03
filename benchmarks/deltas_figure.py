"""Draws the three studies of deltas side by side: a dot a seed, a line at the mean.

python benchmarks/deltas_figure.py docs/evidence/deltas_study.json --output docs/evidence/deltas_study.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from methods import STUDIES


def main() -> None:
    """Read the results and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what methods.py wrote, named as its study")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in args.results}
    rows = list(dict.fromkeys(variant for results in found.values() for variant in results))
    figure, axes = plt.subplots(1, len(found), figsize=(11, 0.9 + 0.36 * len(rows)), sharey=True, layout="constrained")
    for axis, (name, results) in zip(axes, found.items(), strict=True):
        key, label, scale = STUDIES[name].columns[0]
        for variant, runs in results.items():
            values, row = [scale * run[key] for run in runs.values()], rows.index(variant)
            axis.plot(values, [row] * len(values), "o", color="C0", alpha=0.5, markeredgewidth=0)
            axis.plot([statistics.mean(values)] * 2, [row - 0.32, row + 0.32], color="black", linewidth=2)
            count = next(iter(runs.values()))["trainables"] / 1e3
            axis.annotate(
                f"{count:,.0f} k" if count >= 10 else f"{count:.1f} k",
                (1.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color="0.4",
            )
        axis.set_title(STUDIES[name].setting, fontsize=9)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()

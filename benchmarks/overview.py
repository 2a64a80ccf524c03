"""The README's figure, from the tables of docs/evidence: `python benchmarks/overview.py` writes docs/overview.png."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"
FIGURE = EVIDENCE.parent / "overview.png"
PLAIN, OURS = "#9aa5b1", "#1f6f8b"


def number(file: str, pattern: str) -> float:
    """Return the number in the one place of an evidence file that matches a pattern with one group."""
    (found,) = re.findall(pattern, (EVIDENCE / file).read_text(encoding="utf-8"))
    return float(found)


def bars(axes: Any, title: str, unit: str, values: dict[str, float], ours: int) -> None:
    """Draw horizontal bars with their values; the first ``ours`` counted from the end are the library's."""
    names = list(values)
    colours = [PLAIN] * (len(names) - ours) + [OURS] * ours
    drawn = axes.barh(names, list(values.values()), color=colours, height=0.62)
    axes.bar_label(drawn, fmt="%.1f" if max(values.values()) > 10 else "%.2f", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=9)
    axes.set_xlim(0, max(values.values()) * 1.22)
    axes.tick_params(labelsize=9, length=0)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw and write the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def study(variant: str) -> float:
        return number("sparsity.md", rf"\| {variant} \| 3 \| ([\d.]+) ±")

    def lite0(method: str, budget: str, column: str) -> float:
        row = rf"\| lite0 \| {method} \| {budget} \| 3 \| "
        ends = {"accuracy": r"([\d.]+) \(", "speed": r"[^|]*\|[^|]*\|[^|]*\|[^|]*\| ([\d.]+) \("}
        return number("pruning.md", row + ends[column])

    def shift(place: int) -> float:
        return number("tta.md", r"\| error under shift, % \|" + r"[^|]*\|" * place + r" ([\d.]+) ")

    figure, axes = plt.subplots(1, 4, figsize=(13, 2.5), layout="constrained")
    recipes = {"dense": "dense", "2:4 STE": "ste 2:4", "2:4 SR-STE": "sr-ste 2:4", "2:4 MDGF": "mdgf-exponential 2:4"}
    bars(axes[0], "Smaller: NMSparsity", "test accuracy, %", {name: study(row) for name, row in recipes.items()}, 3)
    cuts = {"dense": ("dense", "none")}
    cuts |= {f"{share} % fewer FLOPs": ("structured", rf"0\.{share // 10}") for share in (30, 70)}
    speeds = {f"{name}\n({lite0(*row, 'accuracy'):.1f} % acc.)": lite0(*row, "speed") for name, row in cuts.items()}
    bars(axes[1], "Faster: StructuredPruning", "measured speed-up, batch 1, CPU", speeds, 2)
    errors = {name: shift(place) for place, name in enumerate(("source", "Tent", "EATA"))}
    bars(axes[2], "Robust: test-time adaptation", "error under shift, %", errors, 2)
    shares = {"dense": 1.0, "LayerGrowth": number("growth.md", r"\| grown at 25 % \|.*?\*\*([\d.]+) of dense's")}
    bars(axes[3], "Cheaper: LayerGrowth", "FLOPs to dense's final loss", shares, 1)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()

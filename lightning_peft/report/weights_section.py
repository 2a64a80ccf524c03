"""The part of a report about the weights themselves."""

from __future__ import annotations

from functools import partial

from lightning_peft.report import plots as plots
from lightning_peft.report.contents import Figure, Section, Table
from lightning_peft.report.weights import Weights, size_estimate


def weights_section(weights: Weights) -> Section:
    """Return counts, sizes and plots of a checkpoint's weights."""
    sizes = size_estimate(weights)
    text = [
        f"{weights.parameters:,} parameters, {weights.nonzero:,} of them not zero "
        f"({100 * weights.nonzero / max(weights.parameters, 1):.1f} %)."
    ]
    if sizes["packed"] < sizes["dense"]:
        text.append(
            f"Dense in float32 they take {_size(sizes['dense'])}. Packed, with N values and N positions of ceil(log2 M) "
            f"bits a group, they would take {_size(sizes['packed'])}: arithmetic, no such file is written here."
        )
    else:
        text.append(f"In float32 they take {_size(sizes['dense'])}.")
    rows = tuple(
        (
            row.name.removesuffix(".weight"),
            " x ".join(map(str, row.shape)),
            ", ".join(row.maps),
            row.total,
            row.nonzero,
            f"{100 * row.density:.1f} %",
        )
        for row in weights.rows
    )
    table = Table(("layer", "shape", "maps", "stored", "non-zero", "density"), rows, f"All {len(rows)} weights", len(rows) > 12)
    figures = []
    if weights.edges:
        draw = partial(plots.histogram, weights.edges, weights.before, weights.after)
        figures.append(Figure("histogram", "What the optimizer stores, and what the baked network holds.", draw))
    if weights.rows:
        figures.append(Figure("density", "Share of non-zero values in each weight.", partial(plots.densities, weights.bars())))
    return Section("Weights", tuple(text), (table,), tuple(figures))


def _size(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size:,.0f} bytes"

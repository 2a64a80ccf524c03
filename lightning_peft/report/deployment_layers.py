"""The part of a deployment report about layers."""

from __future__ import annotations

from functools import partial

from lightning_peft.measure.figures import Comparison
from lightning_peft.measure.layers import LayerCost
from lightning_peft.report import deployment_plots
from lightning_peft.report.contents import Cell, Figure, Section, Table
from lightning_peft.report.trial import flop_text


def layers_section(found: Comparison) -> Section:
    """Return costs layer by layer, matched by name, and a plot of their FLOPs."""
    before = {layer.name: layer for layer in found.before.layers}
    after = {layer.name: layer for layer in found.after.layers}
    names = list(dict.fromkeys([*after, *before]))
    names.sort(key=lambda name: name == "(other)")
    rows = tuple(_layer_row(name, before.get(name), after.get(name)) for name in names)
    costs = [f"{cost} {name}" for cost in ("FLOPs", "time") for name in found.names]
    heads = ("layer", "shape", "parameters", "non-zero", *costs)
    table = Table(heads, rows, f"All {len(rows)} layers", folded=len(rows) > 40)
    bars = [
        (name or "(network)", _flops_of(before.get(name)), _flops_of(after.get(name)))
        for name in names
        if _flops_of(before.get(name)) or _flops_of(after.get(name))
    ]
    figures = []
    if bars:
        shown = bars
        if len(bars) > deployment_plots.MOST_LAYERS:
            dearest = set(sorted(bars, key=lambda bar: -max(bar[1:]))[: deployment_plots.MOST_LAYERS])
            shown = [bar for bar in bars if bar in dearest]
        caption = f"FLOPs of {'each layer' if shown is bars else f'the {len(shown)} dearest layers'} in one call."
        figures.append(Figure("layer-flops", caption, partial(deployment_plots.layer_flops, shown, found.names)))
    text = (
        f"FLOPs are those of one call with {found.after.batch_size} samples, time is the share of a call while every layer is "
        "watched. A layer's numbers are without those of the layers in it; `(other)` are modules without weights and FLOPs.",
    )
    return Section("Layers", text, (table,), tuple(figures))


def _layer_row(name: str, one: LayerCost | None, other: LayerCost | None) -> tuple[Cell, ...]:
    last = other or one
    assert last is not None
    shapes = dict.fromkeys(" x ".join(map(str, layer.shape)) for layer in (one, other) if layer is not None)
    return (
        name or "(network)",
        " to ".join(filter(None, shapes)),
        last.parameters if last.parameters else None,
        f"{100 * last.nonzero / last.parameters:.1f} %" if last.parameters else "",
        "" if one is None else flop_text(one.flops),
        "" if other is None else flop_text(other.flops),
        "" if one is None else f"{100 * one.share:.1f} %",
        "" if other is None else f"{100 * other.share:.1f} %",
    )


def _flops_of(layer: LayerCost | None) -> float:
    return 0.0 if layer is None else layer.flops

"""Pure functions behind the methods: tensor in, tensor out.

The engine's own mathematics, and what plugins add through the entry-point group ``lightning_peft.functional``; everything is
imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

GROUP = "lightning_peft.functional"

_HOMES = {
    "combine": "compose.loss",
    "decay_exponential": "weights.nm_prune",
    "decay_linear": "weights.nm_prune",
    "diagonal_fisher": "weights.fisher",
    "effective_rank": "measure.spectra",
    "energy_rank": "weights.low_rank",
    "geometric_frames": "weights.nm_pattern",
    "gradient": "weights.importance",
    "intruder_dimensions": "measure.spectra",
    "is_nm": "weights.nm",
    "magnitude": "weights.importance",
    "kept_magnitude": "weights.nm_permutation",
    "nm_mask": "weights.nm",
    "nm_permutation": "weights.nm_permutation",
    "nm_violations": "weights.nm",
    "stable_rank": "measure.spectra",
    "ste_prune": "weights.nm_prune",
    "stepwise_frames": "weights.nm_pattern",
    "taylor": "weights.importance",
    "transposable_nm_mask": "weights.nm_transposable",
    "truncate": "weights.low_rank",
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        value = getattr(import_module(f"lightning_peft.{_HOMES[name]}"), name)
    else:
        points = {point.name: point for point in entry_points(group=GROUP)}
        if name not in points:
            from lightning_peft.registry import suggest

            raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{suggest(name, [*_HOMES, *points])}")
        value = points[name].load()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOMES, *(point.name for point in entry_points(group=GROUP))})

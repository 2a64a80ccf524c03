"""The contents of a checkpoint, tensor by tensor: shape, methods on it, stored and non-zero values, N:M proof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_peft.baking.bake import baked
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure.partial import filled
from lightning_peft.structure.plain_state import joined
from lightning_peft.weights.mapped_layer import stored_key

_NAMED_LAYERS = 60  # a bar a layer; longer lists are cut to the layers under a method


@dataclass(frozen=True)
class TensorRow:
    """One weight of two dimensions or more.

    Attributes:
        name: Qualified name.
        shape: Its shape.
        maps: Weight maps on it, in order.
        total: Number of values.
        nonzero: How many are not zero once baked.
        pattern: ``"2:4"`` when an N:M map is on it.
    """

    name: str
    shape: tuple[int, ...]
    maps: tuple[str, ...]
    total: int
    nonzero: int
    pattern: str = ""

    @property
    def density(self) -> float:
        """Share of non-zero values."""
        return self.nonzero / max(self.total, 1)


@dataclass(frozen=True)
class Weights:
    """All weights of a checkpoint once baked.

    Attributes:
        rows: Matrices and filters.
        parameters: Values of all floating-point tensors.
        nonzero: How many of them are not zero.
        edges: Edges of the histogram's bins.
        before: Stored values of mapped weights in each bin.
        after: Their baked non-zero values in each bin.
        state: Baked tensors by plain name.
    """

    rows: tuple[TensorRow, ...]
    parameters: int
    nonzero: int
    edges: tuple[float, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def mapped(self) -> list[TensorRow]:
        """Weights under a map."""
        return [row for row in self.rows if row.maps]

    def bars(self) -> list[tuple[str, float, bool]]:
        """Return what :func:`lightning_peft.report.plots.densities` draws."""
        rows = self.rows if len(self.rows) <= _NAMED_LAYERS else self.mapped[:_NAMED_LAYERS] or self.rows[:_NAMED_LAYERS]
        return [(row.name.removesuffix(".weight"), row.density, bool(row.maps)) for row in rows]

    def as_data(self) -> dict[str, Any]:
        """Return plain data without the tensors."""
        return {
            "parameters": self.parameters,
            "nonzero": self.nonzero,
            "density": self.nonzero / max(self.parameters, 1),
            "layers": [{**asdict(row), "density": row.density} for row in self.rows],
        }


def weigh(checkpoint: Mapping[str, Any], base: Mapping[str, Tensor] | None = None) -> Weights:
    """Count the weights of a checkpoint.

    Args:
        checkpoint: What :func:`lightning_peft.baking.bake.read_checkpoint` returned; baked ones work too.
        base: Tensors by name, for a checkpoint that holds only what was trained on them.

    Raises:
        CheckpointError: The recorded weight maps do not fit the tensors, or the base is missing or another one.
    """
    section = files.read(checkpoint)
    maps: Mapping[str, Sequence[dict[str, Any]]] = {} if section is None else section["weights"]
    stored = joined(filled(checkpoint["state_dict"], section, base), section)
    state: dict[str, Tensor] = {
        name: value for name, value in baked(checkpoint, base)["state_dict"].items() if isinstance(value, Tensor)
    }
    values = {name: value for name, value in state.items() if value.is_floating_point() and not _is_statistic(name)}
    values = {name: values[name] for name in _untied(values, checkpoint["state_dict"])}
    rows = tuple(_row(name, value, maps.get(name, ())) for name, value in values.items() if value.ndim > 1)
    parameters = sum(value.numel() for value in values.values())
    nonzero = sum(int(value.count_nonzero()) for value in values.values())
    if not maps:
        return Weights(rows, parameters, nonzero, state=state)
    before = torch.cat([stored[stored_key(name)].flatten().float() for name in maps])
    after = torch.cat([state[name].flatten().float() for name in maps])
    # Ends at quantiles, because a few outliers would leave all others in one bin; a sample is enough to find them.
    sample = torch.cat([before, after])
    sample = sample[:: max(1, sample.numel() // 100_000)]
    low, high = float(sample.quantile(0.001)), float(sample.quantile(0.999))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return Weights(rows, parameters, nonzero, state=state)
    edges = torch.linspace(low, high, 82)
    return Weights(rows, parameters, nonzero, **_histogram(edges, before, after[after != 0]), state=state)


def _untied(values: Mapping[str, Tensor], saved: Mapping[str, Any]) -> list[str]:
    """Return one name of each tensor: what layers share is one storage in the file, whatever was made of it since."""
    first: dict[tuple[Any, ...], str] = {}
    for name, value in values.items():
        given = saved.get(name, value)
        first.setdefault((given.data_ptr() or name, given.shape, given.stride()), name)
    return list(first.values())


def _row(name: str, value: Tensor, records: Sequence[dict[str, Any]]) -> TensorRow:
    pattern = next(
        (f"{item['config']['n']}:{item['config']['m']}" for item in records if {"n", "m"} <= set(item["config"])), ""
    )
    kinds = tuple(item["map"] for item in records)
    return TensorRow(name, tuple(value.shape), kinds, value.numel(), int(value.count_nonzero()), pattern)


def _histogram(edges: Tensor, before: Tensor, after: Tensor) -> dict[str, Any]:
    return {
        "edges": tuple(edges.tolist()),
        "before": tuple(int(count) for count in torch.histogram(before, edges).hist.tolist()),
        "after": tuple(int(count) for count in torch.histogram(after, edges).hist.tolist()),
    }


def _is_statistic(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in {"running_mean", "running_var", "num_batches_tracked"}


def size_estimate(weights: Weights, bits: int = 32) -> dict[str, float]:
    """Bytes of the weights dense, and packed as N:M where an N:M map stands, as arithmetic only.

    Packed, a group of M values is N values and N indices of ``ceil(log2 M)`` bits. No file of that format is written.

    Args:
        weights: What :func:`weigh` returned.
        bits: Bits of a value.

    Returns:
        ``dense`` and ``packed`` bytes.

    Example:
        >>> row = TensorRow("fc", (8, 8), ("nm",), 64, 32, "2:4")
        >>> size_estimate(Weights((row,), 64, 32), bits=16)
        {'dense': 128.0, 'packed': 72.0}
    """
    dense = weights.parameters * bits / 8
    saved = 0.0
    for row in weights.rows:
        if row.pattern:
            m = int(row.pattern.partition(":")[2])
            packed = row.nonzero * (bits + math.ceil(math.log2(m)))
            saved += (row.total * bits - packed) / 8
    return {"dense": dense, "packed": dense - saved}

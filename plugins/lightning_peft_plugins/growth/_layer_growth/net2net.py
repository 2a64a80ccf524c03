"""Net2Net and bert2BERT: new units are copies of old ones, and whoever reads copies reads a share of each.

Net2WiderNet is from Chen et al., "Net2Net", ICLR 2016 (arXiv 1511.05641); FPI (function-preserving initialisation), the same
for Transformers, and AKI (advanced knowledge initialisation) are from Chen et al., "bert2BERT", ACL 2022 (arXiv 2110.07143).

Heads and hidden units may grow to any number. The stream of a network with layer or RMS normalisation is preserved exactly
when its width is multiplied by a whole number and the mapping is circular: else units are replicated unevenly and the
statistics shift. AKI and noise preserve nothing exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.structure.axes import Axes, index_map, is_old
from lightning_peft.structure.edits import Edit
from lightning_peft_plugins.growth._layer_growth.used_values import Values, on_used_values


def unit_mapping(old: int, new: int, generator: torch.Generator | None = None) -> Tensor:
    """Old unit of every new one: the identity on old units, then circular, or uniform at random when given a generator.

    Example:
        >>> unit_mapping(2, 5)
        tensor([0, 1, 0, 1, 0])
    """
    if generator is None:
        return torch.arange(new) % old
    return torch.cat((torch.arange(old), torch.randint(old, (new - old,), generator=generator)))


def replicate(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """Copy along an output dimension.

    Args:
        weight: Any shape.
        dim: The dimension.
        index: Old coordinate of every new one.

    Example:
        >>> replicate(torch.tensor([1.0, 2.0]), 0, torch.tensor([0, 1, 0]))
        tensor([1., 2., 1.])
    """
    return weight.index_select(dim, index.to(weight.device))


def share(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """Copy along an input dimension and divide by how often each old coordinate is replicated.

    Example:
        >>> share(torch.tensor([[1.0, 2.0]]), 1, torch.tensor([0, 1, 0]))
        tensor([[0.5000, 2.0000, 0.5000]])
    """
    counts = index.bincount(minlength=weight.shape[dim])[index].to(weight)
    shape = [-1 if position == dim else 1 for position in range(weight.ndim)]
    return replicate(weight, dim, index) / counts.view(shape)


@on_used_values
def net2net(
    values: Values,
    edit: Edit,
    generator: torch.Generator,
    *,
    mapping: Literal["circular", "random"] = "circular",
    noise: float = 0.0,
) -> dict[str, Tensor]:
    """Widen by FPI.

    Args:
        values: Old values by qualified name.
        edit: A width edit.
        generator: On the CPU.
        mapping: How old units are chosen for new ones.
        noise: Standard deviation of the noise on new coordinates of weights, in units of the old weight's (Net2Net's code:
            ``5e-2``). Without noise copies get equal gradients for ever.

    Returns:
        New values of the edit's tensors.
    """
    new = _replicated(values, edit, _units(edit["axes"], mapping, generator))
    for name, entry in edit["tensors"].items() if noise else ():
        if entry["role"] == "weight":
            fresh = ~old_mask(new[name], entry, edit["axes"])
            new[name] = new[name] + noise * values[name].std(correction=0) * fresh * normal_like(new[name], generator)
    return new


@on_used_values
def aki(values: Values, edit: Edit, generator: torch.Generator) -> dict[str, Tensor]:
    """Widen by AKI: new output rows, and their biases, are those of the next layer; the last layer takes its own.

    The next layer of ``blocks.3.attn.proj.weight`` is ``blocks.4.attn.proj.weight``. Embeddings and norms follow FPI.

    Args:
        values: Old values by qualified name.
        edit: A width edit.
        generator: Not used: units are chosen circularly.

    Returns:
        New values of the edit's tensors.
    """
    axes = edit["axes"]
    units = _units(axes, "circular", generator)
    new = _replicated(values, edit, units)
    for name, entry in edit["tensors"].items():
        upper = next_layer(name, values, edit["path"])
        if upper is None or entry["role"] not in ("weight", "bias") or values[upper].shape != values[name].shape:
            continue
        row = next(position for position in range(values[name].ndim) if position != entry["input"])
        if entry["from"][row] == entry["to"][row]:
            continue
        kept = _along(is_old(entry["dims"][row], axes), row, new[name])
        new[name] = torch.where(kept, new[name], fpi(values[upper], entry, axes, units))
    return new


def _replicated(values: Values, edit: Edit, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    axes = edit["axes"]
    return {
        name: _tied_head(fpi(values[name], entry, axes, units), entry, axes, units) for name, entry in edit["tensors"].items()
    }


def fpi(value: Tensor, entry: Mapping[str, Any], axes: Axes, units: Mapping[str, Tensor]) -> Tensor:
    """Widen one tensor.

    Args:
        value: Old value.
        entry: Its entry in ``edit["tensors"]``.
        axes: ``edit["axes"]``.
        units: Old unit of every new one, by axis.
    """
    for position, dim in enumerate(entry["dims"]):
        index = index_map(dim, axes, units)
        value = (share if position == entry["input"] else replicate)(value, position, index)
    return value


def next_layer(name: str, names: Mapping[str, object], path: str = "") -> str | None:
    """Name of the same tensor one layer up; ``None`` when there is none.

    Example:
        >>> next_layer("h.0.fc.weight", {"h.0.fc.weight": 0, "h.1.fc.weight": 0})
        'h.1.fc.weight'
    """
    parts = name.split(".")
    start = len(path.split(".")) if path else 0
    place = next((i for i in range(start, len(parts)) if parts[i].isdigit()), None)
    if place is None:
        return None
    upper = ".".join([*parts[:place], str(int(parts[place]) + 1), *parts[place + 1 :]])
    return upper if upper in names else None


def old_mask(value: Tensor, entry: Mapping[str, Any], axes: Axes) -> Tensor:
    """Which coordinates of a new tensor are old ones; broadcasts to its shape."""
    kept = torch.ones((), dtype=torch.bool, device=value.device)
    for position, dim in enumerate(entry["dims"]):
        kept = kept & _along(is_old(dim, axes), position, value)
    return kept


def normal_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a tensor's shape, the same on every device."""
    return torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)


def _along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    return vector.to(like.device).view([-1 if position == dim else 1 for position in range(like.ndim)])


def _units(axes: Axes, mapping: str, generator: torch.Generator) -> dict[str, Tensor]:
    return {label: unit_mapping(old, new, generator if mapping == "random" else None) for label, (old, new) in axes.items()}


def _tied_head(value: Tensor, entry: Mapping[str, Any], axes: Axes, units: Mapping[str, Tensor]) -> Tensor:
    """Divide what is read by a head whose weight is also the embedding, and so could not be divided itself."""
    if not entry.get("tied_head"):
        return value
    index = index_map(entry["dims"][0], axes, units)
    return value / index.bincount()[index].to(value)

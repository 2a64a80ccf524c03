"""Records of a network's depth outside the list of blocks: configurations, layer numbers, stochastic-depth rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.structure.edit_types import Recorded
from lightning_peft.structure.errors import CheckpointError

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_INDICES = ("layer_idx", "layer_id")


def drop_rates(blocks: Sequence[nn.Module]) -> dict[str, list[float]]:
    """Read the stochastic-depth rate of every block, by the name of the layer in the block.

    timm leaves an ``Identity`` where the rate is zero.
    """
    names = {name for block in blocks for name, layer in block.named_modules() if _is_drop_path(layer)}
    return {name: [_rate(block, name) for block in blocks] for name in sorted(names)}


def _is_drop_path(layer: nn.Module) -> bool:
    return type(layer).__name__.endswith(("DropPath", "StochasticDepth"))


def _rate(block: nn.Module, name: str) -> float:
    layer = dict(block.named_modules()).get(name)
    return float(getattr(layer, _rate_attribute(layer)) or 0.0) if layer is not None and _is_drop_path(layer) else 0.0


def _rate_attribute(layer: nn.Module) -> str:
    return "p" if type(layer).__name__.endswith("StochasticDepth") else "drop_prob"


def redrawn(rates: Sequence[float], count: int) -> list[float] | None:
    """Draw the line through rates again for another number of blocks; ``None`` when they lie on no line.

    Example:
        >>> redrawn([0.0, 0.25, 0.5], 5)
        [0.0, 0.125, 0.25, 0.375, 0.5]
        >>> redrawn([0.0, 0.3, 0.1], 5) is None
        True
    """
    last = len(rates) - 1
    if not any(rates) or last == 0:
        return None
    line = [rates[0] + (rates[-1] - rates[0]) * place / last for place in range(len(rates))]
    if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(line, rates, strict=True)):
        return None
    return [rates[0] + (rates[-1] - rates[0]) * place / max(count - 1, 1) for place in range(count)]


def check_rates(edit: Recorded) -> None:
    """Refuse malformed rates in a recorded edit.

    Raises:
        CheckpointError: They are no numbers from 0 to 1, or not one for each block.
    """
    for key, count in (("rates", len(edit["sources"])), ("old_rates", edit["from"])):
        rates = edit.get(key)
        fits = isinstance(rates, dict) and all(
            isinstance(values, list) and len(values) == count and all(isinstance(v, float) and 0 <= v <= 1 for v in values)
            for values in rates.values()
        )
        if not fits:
            raise CheckpointError(f"A recorded change of {edit['path']} is malformed: {key!r} must hold a rate a block.")


def settle(
    module: nn.Module,
    path: str,
    sources: Sequence[int],
    before: int,
    rates: Mapping[str, Sequence[float]],
    *,
    counts: bool = True,
) -> None:
    """Put right what is noted about a list whose blocks are in place.

    Args:
        module: The module.
        path: Qualified name of the list.
        sources: Position in the old list of every block.
        before: Length of the old list.
        rates: Stochastic-depth rates, by the name of the layer in the block.
        counts: Whether numbers of layers are looked for by their usual names, because no class could be asked for them.
    """
    blocks: list[nn.Module] = list(module.get_submodule(path)._modules.values())  # type: ignore[arg-type]
    numbered: set[int] = set()
    for place, (block, source) in enumerate(zip(blocks, sources, strict=True)):
        if id(block) not in numbered:  # a block that stands in several places keeps the number of the first
            _number(block, source, place)
            numbered.add(id(block))
    for name, values in rates.items():
        _set_rates(blocks, name, values)
    owners = list(_ancestors(module, path))
    configs = [vars(owner)["config"] for owner, _ in owners if "config" in vars(owner)]
    # Only the nearest: one further out can count the layers of something else (the encoder beside a decoder).
    for holder in (owners[0][0], *configs[:1]) if counts else ():
        _set_count(holder, before, sources)
    for owner, name in owners:
        _set_features(owner, name, before, sources)


def _ancestors(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """Owners of a list from the nearest out, with the name of the list inside each."""
    parts = path.split(".")
    for length in range(len(parts) - 1, -1, -1):
        yield module.get_submodule(".".join(parts[:length])), ".".join(parts[length:])


def _number(block: nn.Module, source: int, place: int) -> None:
    for layer in block.modules():
        for attribute in _INDICES:
            if vars(layer).get(attribute) == source and source != place:
                setattr(layer, attribute, place)
                if getattr(layer, "scale_attn_by_inverse_layer_idx", False):  # GPT-2 divides by the number of the layer
                    layer.__dict__["scaling"] *= (source + 1) / (place + 1)


def _set_rates(blocks: Sequence[nn.Module], name: str, rates: Sequence[float]) -> None:
    layers = [dict(block.named_modules()).get(name) for block in blocks]
    template = next((layer for layer in layers if layer is not None and _is_drop_path(layer)), None)
    for block, layer, rate in zip(blocks, layers, rates, strict=True):
        if layer is None or template is None or (rate == 0.0 and not _is_drop_path(layer)):
            continue
        if not _is_drop_path(layer):
            layer = copy.deepcopy(template)
            block.set_submodule(name, layer)
        setattr(layer, _rate_attribute(layer), rate)


def _set_count(holder: Any, before: int, sources: Sequence[int]) -> None:
    """Set the number of layers where the owner of the list, or its configuration, says the old one."""
    for attribute in _COUNTS:
        if type(getattr(holder, attribute, None)) is int and getattr(holder, attribute) == before:
            setattr(holder, attribute, len(sources))
    kinds = getattr(holder, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == before:
        holder.layer_types = [kinds[source] for source in sources]


def _set_features(owner: nn.Module, name: str, before: int, sources: Sequence[int]) -> None:
    """Rewrite timm's list of feature maps when it has one entry a block."""
    features = vars(owner).get("feature_info")
    if isinstance(features, list) and [entry.get("module") for entry in features if isinstance(entry, dict)] == [
        f"{name}.{place}" for place in range(before)
    ]:
        owner.feature_info = [  # type: ignore[assignment]
            {**features[source], "module": f"{name}.{place}"} for place, source in enumerate(sources)
        ]

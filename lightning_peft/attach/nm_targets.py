"""Which of the layers a method names can hold an N:M pattern."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.attach.targets import PRESETS, TargetSpec
from lightning_peft.weights.nm_layout import inputs


def wide_layers(
    layers: Mapping[str, nn.Module], patterns: Mapping[str, tuple[int, int]], targets: TargetSpec | None
) -> dict[str, nn.Module]:
    """Leave out layers of a preset that have fewer than M inputs.

    Args:
        layers: The layers, by name.
        patterns: N and M of each.
        targets: What they were selected by.

    Raises:
        MisconfigurationException: Such a layer was named itself, or no other is left.

    Example:
        >>> net = {"a": nn.Linear(2, 4), "b": nn.Linear(4, 4)}
        >>> list(wide_layers(net, dict.fromkeys(net, (2, 4)), "all-linear"))
        ['b']
    """
    wide = {name: layer for name, layer in layers.items() if inputs(layer) >= patterns[name][1]}
    named = isinstance(targets, (list, tuple)) and PRESETS.keys().isdisjoint(map(str, targets))
    if not wide or (named and len(wide) < len(layers)):
        name = next(name for name in layers if name not in wide)
        n, m = patterns[name]
        raise MisconfigurationException(
            f"{name} has {inputs(layers[name])} inputs, fewer than one group of {n}:{m}. Leave it out with "
            f"exclude=[{name!r}], or give it a smaller M."
        )
    return wide

"""Which layers can hold an N:M pattern, and along which dimension of their weight the groups run."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.network.targets import PRESETS, TargetSpec

_SUPPORTED = "Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d/2d/3d (groups=1), transformers' Conv1D"


def input_dim(module: nn.Module) -> int:
    """Dimension of ``module.weight`` that runs over the inputs, where N:M groups lie.

    ``Linear`` (out, in) and ``Conv*d`` (out, in / groups, ...) group along dimension 1 (for convolutions the same groups
    as in the channels-last memory that hardware reads), ``ConvTranspose*d`` (in, out, ...) and transformers' ``Conv1D``
    (in, out) along dimension 0.

    Args:
        module: A layer with a ``weight``.

    Returns:
        The dimension's index, 0 or 1.

    Raises:
        MisconfigurationException: If the layer has no N:M layout; the message lists the supported types.

    Example:
        >>> input_dim(nn.Linear(8, 4)), input_dim(nn.ConvTranspose2d(8, 4, 3))
        (1, 0)
    """
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 1
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and module.groups == 1:
        return 0
    # By name, so that transformers need not be importable; torch's own class is spelt Conv1d.
    if any(base.__name__ == "Conv1D" for base in type(module).__mro__) and hasattr(module, "nf"):
        return 0
    raise MisconfigurationException(
        f"No N:M layout for a layer of type {type(module).__name__}. Supported: {_SUPPORTED}. "
        "Leave this layer out of the targets (or put it in exclude=)."
    )


def output_dim(module: nn.Module, m: int) -> int | None:
    """Dimension of ``module.weight`` that runs over the outputs, along which the backward pass sums.

    ``None`` where groups of ``m`` outputs would belong to several groups of a convolution, which sum on their own.

    Example:
        >>> output_dim(nn.Linear(8, 4), 4), output_dim(nn.Conv2d(8, 8, 1, groups=4), 4)
        (0, None)
    """
    groups = getattr(module, "groups", 1)
    return None if groups > 1 and (outputs(module) // groups) % m else 1 - input_dim(module)


def inputs(module: nn.Module) -> int:
    """Size of that dimension.

    Example:
        >>> inputs(nn.Linear(8, 4))
        8
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[input_dim(module)]


def outputs(module: nn.Module) -> int:
    """Size of the dimension of a layer's weight that runs over the outputs.

    Example:
        >>> outputs(nn.Linear(8, 4))
        4
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1 - input_dim(module)]


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

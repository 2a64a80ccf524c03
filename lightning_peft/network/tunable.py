"""Parameters that are trained as they are beside a frozen network: biases, normalisation layers, the head."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_peft.arguments import one_of
from lightning_peft.network.layers import heads, is_norm, own_parameters

TUNABLE = ("bias", "norm", "head")


def kinds_of(tune: Collection[str]) -> tuple[str, ...]:
    """Read an argument ``tune=``: some of :data:`TUNABLE`, or one alone.

    Raises:
        MisconfigurationException: It names another kind.

    Example:
        >>> kinds_of("head"), kinds_of(["bias", "norm"])
        (('head',), ('bias', 'norm'))
    """
    kinds = (tune,) if isinstance(tune, str) else tuple(tune)
    for kind in kinds:
        one_of("tune", kind, TUNABLE)
    return kinds


def tunable(module: nn.Module, kinds: Collection[str], mapped: Collection[str] = ()) -> dict[nn.Parameter, str]:
    """Find parameters by kind.

    Args:
        module: The module.
        kinds: Some of :data:`TUNABLE`.
        mapped: Names of layers whose weight stands under a map. The weight of a head among them is not found: it is frozen
            like that of any other.

    Returns:
        Each parameter with the name of its layer, in module order.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
        >>> list(tunable(net, ("norm",)).values()), len(tunable(net, ("bias", "head")))
        (['1', '1'], 4)
    """
    layers = dict(module.named_modules())
    written = set(heads(layers.values())) if "head" in kinds else set()
    found: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        for key, parameter in own_parameters(layer).items():
            bias = "bias" in kinds and key.endswith("bias")
            head = layer in written and not (name in mapped and key == "weight")
            if bias or head or ("norm" in kinds and is_norm(layer)):
                found[parameter] = name  # type: ignore[index]
    return found


def share_trained(module: nn.Module) -> float:
    """Share of a module's parameters that require a gradient.

    Example:
        >>> share_trained(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False).requires_grad_(False)))
        0.5
    """
    parameters = list(module.parameters())
    return sum(each.numel() for each in parameters if each.requires_grad) / sum(each.numel() for each in parameters)

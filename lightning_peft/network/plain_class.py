"""The class a layer's author gave it, whatever stands in for it while maps are on its parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class StandIn(nn.Module):
    """Base of classes that take the place of a layer's own for a while.

    Attributes:
        plain_class: The layer's own.
        weight_maps: What is on its parameters, by their names.
    """

    plain_class: ClassVar[type[nn.Module]]
    weight_maps: dict[str, Any]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class a module has without the subclass that weight maps, or ``parametrize``, make of it.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> type(layer).__name__, plain_class(layer).__name__
        ('ParametrizedLinear', 'Linear')
    """
    cls = type(module).plain_class if isinstance(module, StandIn) else type(module)
    # As `parametrize.is_parametrized` asks, which would have a stand-in show its maps as modules in every call of the layer.
    parametrized = isinstance(module._modules.get("parametrizations"), nn.ModuleDict)
    return cls.__bases__[0] if parametrized else cls

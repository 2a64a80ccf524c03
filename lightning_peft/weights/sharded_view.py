"""Shows ``fully_shard`` the parameters of weight maps and layer parts, and the stored values below maps.

It walks over ``children()`` and swaps the parameters that it finds by ``getattr`` and ``setattr`` on the module that has them.
A layer under maps would answer with what the maps make of its weight, so its own parameters are shown as those of a module
beside it that shares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_SHOWN: ContextVar[dict[nn.Module, nn.Module] | None] = ContextVar("shown", default=None)
_SHARED = ("_parameters", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


class StoredValues(nn.Module):
    """The parameters of a layer, read without its maps, and what is to happen before they are saved.

    Both are the layer's own: what is set here is set there.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        vars(self).update({name: vars(layer)[name] for name in _SHARED})


@contextmanager
def shown_to_sharding() -> Iterator[None]:
    """Let walks over ``children()`` come by maps, parts and stored values, as long as it lasts."""
    token = _SHOWN.set({})
    try:
        yield
    finally:
        _SHOWN.reset(token)


def is_shown() -> bool:
    """Whether that lasts: a layer under maps answers with stored values then."""
    return _SHOWN.get() is not None


def stored_values(layer: nn.Module) -> nn.Module | None:
    """The module that shows a layer's stored values; ``None`` where walks see the layer as it is."""
    shown = _SHOWN.get()
    if shown is None:
        return None
    if layer not in shown:
        shown[layer] = StoredValues(layer)
    return shown[layer]

"""An adapter layer of PEFT as a part beside a layer: it computes with the layer, and holds nothing of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Lane, LayerPart
from lightning_peft_plugins.deltas._peft_adapter.injection import peft_layer
from lightning_peft_plugins.deltas._peft_adapter.layer_shell import layer_shell


class TunerPart(LayerPart):
    """Answers a call of a layer as PEFT's adapter layer round it would.

    PEFT puts its layer in the place of the user's, which becomes its ``base_layer``, and names in the state dict change. Here
    the user's layer stays where it is; the adapter's holds a ``base_layer`` only for the length of a call.

    Args:
        config: PEFT's configuration, its targets found, as plain data.
        path: Name of the layer in the network, which PEFT looks up in patterns of ranks.
        layer: The layer, as :func:`~lightning_peft_plugins.deltas._peft_adapter.layer_shell.described_layers` says.
        base: A layer like it, for whose weight the adapter is initialised; it may be changed.
    """

    kind = "peft_tuner"
    lane = Lane.DELTA
    follows = None

    def __init__(self, config: Mapping[str, Any], path: str, layer: Mapping[str, Any], base: nn.Module | None = None) -> None:
        super().__init__()
        self._record = {"config": dict(config), "path": path, "layer": dict(layer)}
        self.tuner = peft_layer(config, path, layer_shell(layer) if base is None else base)
        del self.tuner._modules["base_layer"]
        self.trained = tuple(name for name, tensor in self.tuner.named_parameters() if tensor.requires_grad)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, call: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _with_base(self.tuner, _called(layer, call)).forward(*args, **kwargs)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight that PEFT's own merge leaves in the layer; in the precision of the adapter where that is lower."""
        own = next((tensor.dtype for tensor in self.tuner.parameters() if tensor.is_floating_point()), weight.dtype)
        narrow = own if torch.promote_types(own, weight.dtype) != own else weight.dtype
        base = layer_shell(self._record["layer"], weight.to(narrow, copy=True))
        _with_base(self.tuner, base).merge()
        merged: Tensor = base.weight.detach().to(weight.dtype)  # type: ignore[operator,union-attr]
        return merged

    def config(self) -> dict[str, Any]:
        return self._record


def _with_base(tuner: nn.Module, base: nn.Module) -> Any:
    """Return the same adapter layer, its parameters shared, with a base: nothing of one call stands on a shared object."""
    bound = object.__new__(type(tuner))
    vars(bound).update(vars(tuner))
    vars(bound)["_modules"] = {**tuner._modules, "base_layer": base}
    vars(bound)["merged_adapters"] = []
    return bound


_CLASSES: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def _called(layer: nn.Module, call: Callable[..., Any]) -> nn.Module:
    """Return the layer as the adapter sees it: the same class and tensors, and calls that go to what is below the part."""
    cls = _CLASSES.get(type(layer))
    if cls is None:
        cls = _CLASSES[type(layer)] = type(type(layer).__name__, (type(layer),), {"__call__": _answer, "forward": _answer})
    seen: nn.Module = object.__new__(cls)
    vars(seen).update(vars(layer))
    vars(seen)["_below"] = call
    return seen


def _answer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return vars(self)["_below"](*args, **kwargs)

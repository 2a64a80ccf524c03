"""Calls of layers, shown to a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from lightning_peft.capture.look import GradientLook, Look
from lightning_peft.capture.shim import Shim
from lightning_peft.capture.tap import forward_attribute

SeeCall: TypeAlias = Callable[[str, nn.Module, Any, Any], None]


class LayerCalls:
    """Looks at the calls of some layers until it is closed."""

    def __init__(self) -> None:
        self._shims: list[Shim] = []

    def open(self, layers: Mapping[str, nn.Module], see: SeeCall) -> None:
        """Begin to look, in place of what was looked at before.

        Args:
            layers: The layers, by any names.
            see: Called with a layer's name, the layer, its first argument and what it returned.
        """
        self.close()
        for name, layer in layers.items():
            self._shims.append(Shim(layer, forward_attribute(layer), _handler(name, layer, see)).install())

    def open_gradients(self, layers: Mapping[str, nn.Module], see: SeeCall, wanted: Callable[[], bool]) -> None:
        """Begin to look at the gradients of what layers return, in place of what was looked at before.

        Args:
            layers: The layers, by any names.
            see: Called in the backward pass with a layer's name, the layer, its first argument and the gradient.
            wanted: Whether a call that is made now counts.
        """
        self.close()
        for name, layer in layers.items():
            handler = _gradient_handler(name, layer, see, wanted)
            self._shims.append(Shim(layer, forward_attribute(layer), handler).install())

    def close(self) -> None:
        """Stop looking."""
        for shim in self._shims:
            shim.remove()
        self._shims = []


def _handler(name: str, layer: nn.Module, see: SeeCall) -> Callable[..., Any]:
    look = Look(partial(see, name, layer))

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        look(args[0] if args else next(iter(kwargs.values())), output)
        return output

    return forward


def _gradient_handler(name: str, layer: nn.Module, see: SeeCall, wanted: Callable[[], bool]) -> Callable[..., Any]:
    look = GradientLook(lambda gradient, given: see(name, layer, given, gradient))

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        return look(output, args[0] if args else next(iter(kwargs.values()))) if wanted() else output

    return forward

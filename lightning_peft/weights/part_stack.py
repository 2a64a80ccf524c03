"""The parts beside one layer, and how a call goes through them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.weights.layer_part import LayerPart


class PartStack:
    """Parts in the order of lanes, innermost first.

    Attributes:
        parts: The parts.
        pristine: Tensors that the layer had before the training of its parts was taken up again, by name, while going back
            means anything.
        version: Counts in-place changes of the parts and of what they go into; ``pristine`` is void once it has moved on.
        beneath: Tensors of the layer without the parts, by name, while those are in them; see :func:`lightning_peft.merge`.
    """

    def __init__(self) -> None:
        self.parts: list[LayerPart] = []
        self.pristine: dict[str, Tensor] = {}
        self.version = 0
        self.beneath: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[LayerPart]:
        return iter(self.parts)

    @property
    def recorded(self) -> list[LayerPart]:
        """The parts that checkpoints tell of."""
        return [part for part in self.parts if part.recorded]

    @property
    def names(self) -> list[tuple[str, str]]:
        """Method and kind of each part that checkpoints tell of."""
        return [(part.method, part.kind) for part in self.recorded]

    def insert(self, part: LayerPart) -> None:
        """Give a part its place: outside those of lower lanes, then of lower order, then of those that came before."""
        self.parts.insert(sum((p.lane, p.order) <= (part.lane, part.order) for p in self.parts), part)

    def call(self, own: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the layer, whose own ``forward`` is the innermost."""
        return self._through(0 if self.beneath else len(self.parts), own, layer, args, kwargs)

    def _through(
        self, depth: int, own: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if depth == 0:
            return own(layer, *args, **kwargs)

        def below(*args: Any, **kwargs: Any) -> Any:
            return self._through(depth - 1, own, layer, args, kwargs)

        part = self.parts[depth - 1]
        # Compiled code that reads the flag would be compiled anew for the second call.
        if torch.compiler.is_compiling() or not part.called:
            part.called = True
        return part.around(below, layer, args, kwargs) if part.enabled else below(*args, **kwargs)

    @property
    def merging(self) -> list[LayerPart]:
        """The parts that go into the weight when the layer becomes an ordinary one, innermost first."""
        return [] if self.beneath else [part for part in self.parts if part.enabled and part.merges]

    @property
    def merges(self) -> bool:
        """Whether there are such parts."""
        return bool(self.merging)

    def into(self, layer: nn.Module) -> list[str]:
        """Names of the layer's own tensors that parts of :attr:`merging` go into."""
        names = {name: None for part in self.merging for name in part.into}
        return [name for name in names if layer._parameters.get(name) is not None]

    @torch.no_grad()
    def merged(self, name: str, value: Tensor, parts: Iterable[LayerPart] | None = None) -> Tensor:
        """Return one of the layer's own tensors with every part of :attr:`merging`, or with some of them."""
        for part in self.merging if parts is None else parts:
            value = part.merged_into(name, value)
        return value.detach()

    @torch.no_grad()
    def take_out(self, layer: nn.Module) -> None:
        """Give the layer back what it had before its parts were merged into it."""
        for name, tensor in self.beneath.items():
            layer._parameters[name].copy_(tensor)  # type: ignore[union-attr]
        self.beneath = {}

    def count(self, layer: nn.Module) -> int:
        """Count in-place changes of the parts' tensors and of the layer's own until now."""
        tensors = [tensor for part in self.parts for tensor in (*part.parameters(), *part.buffers())]
        own = [tensor for tensor in layer._parameters.values() if tensor is not None]
        return sum(tensor._version for tensor in [*tensors, *own])

    def mark(self, layer: nn.Module) -> None:
        """Keep the layer out of PyTorch's fused encoder layer, which passes calls by but looks for hooks."""
        if not any(isinstance(hook, _Mark) for hook in layer._forward_pre_hooks.values()):
            layer.register_forward_pre_hook(_Mark())

    def without_marks(self, layer: nn.Module) -> OrderedDict[int, Any]:
        """Return the layer's hooks without that of :meth:`mark`."""
        return OrderedDict((key, hook) for key, hook in layer._forward_pre_hooks.items() if not isinstance(hook, _Mark))

    def unmark(self, layer: nn.Module) -> None:
        """Undo :meth:`mark`."""
        for key in [key for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, _Mark)]:
            del layer._forward_pre_hooks[key]


class _Mark:
    """A hook that does nothing."""

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        return None

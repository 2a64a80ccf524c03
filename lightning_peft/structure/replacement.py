"""What a method can put in a layer's place: a recipe that a journal names and this process knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn


class Replacement:
    """A recipe for the module that takes a layer's place; a method lists those it uses in ``replacements``.

    A file holds its :attr:`kind` and its arguments, never code: the class is found among those that an installed method
    declares, and made with the recorded arguments.

    Attributes:
        kind: Its name in checkpoints, one of a kind within the method.
        inside: Name that the replaced layer has in the new module when the whole of it goes on there, as under a wrapper;
            ``None`` when the layer leaves.

    Example:
        >>> class Projected(Replacement):
        ...     kind, inside = "projected", "0"
        ...
        ...     def __init__(self, width: int) -> None:
        ...         self.width = width
        ...
        ...     def build(self, layer: nn.Module) -> nn.Module:
        ...         return nn.Sequential(layer, nn.Linear(layer.out_features, self.width))
        ...
        ...     def config(self) -> dict[str, Any]:
        ...         return {"width": self.width}
        >>> Projected(4).build(nn.Linear(2, 3))
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): Linear(in_features=3, out_features=4, bias=True)
        )
    """

    kind: ClassVar[str]
    inside: ClassVar[str | None] = None

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments: numbers, strings, lists and dicts."""
        return {}

    def check(self, layer: nn.Module) -> None:
        """Raise ``ValueError`` when the arguments do not fit the layer; they may come from a damaged file."""

    def build(self, layer: nn.Module) -> nn.Module:
        """Return what takes the layer's place; the same structure for the same layer and arguments.

        When a checkpoint is loaded the layer may be under weight maps of other methods, which make a subclass of its class.
        Random numbers are seeded by the edit. Values matter when the edit is made, for a checkpoint brings its own. A
        tensor that goes on in the new module should stay the ``nn.Parameter`` it is: then its name changes and nothing else,
        neither its value nor what an optimizer knows of it.
        """
        raise NotImplementedError

    def sources(self) -> Mapping[str, str]:
        """Name the tensor of the layer that new tensors are trained like, ``{"0.weight": "weight"}``.

        What is not named is trained like the first tensor of the layer that an optimizer trains. With
        ``optimizer_state="copy"`` a new tensor of its source's shape begins with the source's optimizer state.
        """
        return {}

"""Units (channels, heads) that have coordinates in several tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Kind = Literal["channels", "heads"]


@dataclass(frozen=True)
class UnitPlace:
    """A dimension of a tensor in which units have coordinates.

    Attributes:
        tensor: Qualified name.
        dim: The dimension.
        units: Unit of each of its coordinates, -1 for those that belong to none; shape ``(size,)``.
        scored: Whether its values say how much a unit matters: weights of layers do, biases and statistics do not.
        written: Whether the layer makes the units with it; others read them, or pass them on.
    """

    tensor: str
    dim: int
    units: Tensor
    scored: bool = False
    written: bool = False


@dataclass(frozen=True)
class UnitCount:
    """A number a layer notes that falls with the units.

    Attributes:
        path: Qualified name of the layer.
        attribute: The attribute; of a tuple the last entry falls.
        units: Unit of each thing it counts, -1 for those that belong to none.
    """

    path: str
    attribute: str
    units: Tensor


@dataclass(frozen=True)
class Coupled:
    """Units that stand alone in each tensor that holds a part of them: they can be removed one by one, or change places.

    Attributes:
        name: Qualified name of the layer that makes them.
        kind: What they are.
        units: Their number.
        places: Where they are.
        numbers: What counts them.
    """

    name: str
    kind: Kind
    units: int
    places: Sequence[UnitPlace]
    numbers: Sequence[UnitCount]

    def under(self, prefix: str) -> Coupled:
        """The same group by its names in a module that holds the network as ``prefix``."""
        if not prefix:
            return self
        places = [replace(place, tensor=f"{prefix}.{place.tensor}") for place in self.places]
        numbers = [replace(number, path=f"{prefix}.{number.path}") for number in self.numbers]
        return replace(self, name=f"{prefix}.{self.name}", places=places, numbers=numbers)

"""The tensors whose entries SPT ranks, and what tuning each as a whole costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_peft.deltas.layout import Layout, layout_of
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.sides import Place
from lightning_peft.network.layers import own_parameters
from lightning_peft.network.tunable import tunable


@dataclass(frozen=True)
class Ranked:
    """A tensor whose entries are ranked.

    Attributes:
        name: Qualified name.
        layer: The layer that holds it.
        size: How many entries it has.
        whole: How many numbers are trained where it has many sensitive entries.
        least: How many entries are many; infinity where it gets values at them however many they are.
        layout: How it is read as a matrix; ``None`` for a vector, which is trained as a whole then.
    """

    name: str
    layer: nn.Module
    size: int
    whole: int
    least: float
    layout: Layout | None = None

    @property
    def seen(self) -> Tensor:
        """What the layer sees, made anew whenever it is asked for."""
        tensor: Tensor = getattr(self.layer, self.name.rpartition(".")[2])
        return tensor.detach()

    def room(self, budget: int) -> int:
        """The most coordinates that it can get values at."""
        if self.layout is None:
            return self.size
        return min(self.size, budget, self.size if math.isinf(self.least) else math.ceil(self.least) - 1)


def ranked_matrix(place: Place, rank: int, ease: float) -> Ranked:
    """A matrix; one that a product of this rank would not be smaller than gets none."""
    size = place.stored.numel()
    layout = layout_of(place.layer, place.stored, place.tensor.rpartition(".")[2])
    whole = LowRankForm.trainable(layout, rank)
    fits = rank <= layout.largest_rank and whole < size
    return Ranked(place.tensor, place.layer, size, whole, whole / ease if fits else math.inf, layout)


def ranked_vectors(module: nn.Module, spared: Collection[nn.Module], tuned: Collection[object], ease: float) -> list[Ranked]:
    """Biases and parameters of normalisation layers.

    Args:
        module: The module.
        spared: Layers that are left alone.
        tuned: Parameters that are trained as they are.
        ease: A vector with this share of its entries among the sensitive ones, ``1 / ease``, is trained as a whole.
    """
    holders = Counter(parameter for layer in module.modules() for parameter in own_parameters(layer).values())
    chosen = tunable(module, ("bias", "norm"))
    found = []
    for path, layer in module.named_modules():
        for key, parameter in own_parameters(layer).items():
            if parameter in chosen and parameter not in tuned and layer not in spared and holders[parameter] == 1:
                size = parameter.numel()
                found.append(Ranked(f"{path}.{key}".removeprefix("."), layer, size, size, size / ease))
    return found

"""Which order of a network's channels lets N:M keep the most magnitude: groups found, proven and searched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_peft.structure.coupled.movable import movable_groups
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.reorder import group_orders, reordered
from lightning_peft.weights.nm_permutation import kept_magnitude, nm_permutation


class Sparse(NamedTuple):
    """A weight that will be N:M."""

    weight: Tensor
    n: int
    m: int
    dim: int

    def kept(self, dims: Mapping[int, Tensor] | None = None) -> float:
        """Magnitude that the pattern keeps, in an order."""
        return kept_magnitude(reordered(self.weight, dims or {}), self.n, self.m, self.dim)

    def total(self) -> float:
        """Magnitude there is."""
        return float(self.weight.detach().abs().sum(dtype=torch.float64))


@dataclass
class ChannelOrder:
    """What a search has found.

    Attributes:
        orders: The order of each tensor, by name in the module (:data:`~lightning_peft.structure.reorder.Orders`).
        before: Share of the magnitude of all sparse weights that N:M keeps in the order they have.
        kept: Share that it keeps in the new order.
        groups: Groups of channels that change places.
        left: Why others do not, by the name of the layer that makes them.
    """

    orders: dict[str, dict[int, Tensor]]
    before: float
    kept: float
    groups: int = 0
    left: dict[str, str] = field(default_factory=dict)


def channel_order(
    module: nn.Module,
    path: str,
    network: nn.Module,
    example: Mapping[str, Any],
    sparse: Mapping[str, Sparse],
    *,
    escapes: int,
    frozen: Callable[[Tensor], bool] = lambda _: False,
    excused: Collection[str] = (),
) -> ChannelOrder:
    """Search an order for every group of coupled channels that a sparse weight reads.

    Args:
        module: The module.
        path: Qualified name of the network in it.
        network: The network.
        example: What it is called with.
        sparse: The weights that will be N:M, by name in the module.
        escapes: See :func:`~lightning_peft.weights.nm_permutation.nm_permutation`.
        frozen: Whether a parameter is to stay as it is.
        excused: Qualified names of layers that need not take part in a call of the network.

    Raises:
        MisconfigurationException: Torch-Pruning is missing, or the network cannot be traced or called on its own.
    """
    found = movable_groups(
        module,
        path,
        network,
        example,
        wanted=lambda group: any(_reads(group, name, weight) for name, weight in sparse.items()),
        frozen=frozen,
        excused=excused,
    )
    console = Console(stderr=True)  # of its own: Lightning's progress bar may be live on the common one
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        chosen = {}
        for group in bar.track(found.groups, description="channel orders"):
            order = _search(group, sparse, escapes)
            if _gain(module, group, order, sparse) > 0:
                chosen[group.name] = (group, order)
    orders = group_orders(module, chosen)
    new = [Sparse(reordered(weight.weight, orders.get(name, {})), *weight[1:]) for name, weight in sparse.items()]
    return ChannelOrder(orders, kept_share(sparse.values()), kept_share(new), len(chosen), found.left)


def kept_share(weights: Collection[Sparse]) -> float:
    """Share of the magnitude of weights that their patterns keep."""
    return sum(weight.kept() for weight in weights) / (sum(weight.total() for weight in weights) or 1.0)


def _reads(group: Coupled, name: str, weight: Sparse) -> bool:
    return any(place.tensor == name and place.dim == weight.dim for place in group.places)


def _columns(group: Coupled, name: str, weight: Sparse) -> tuple[int, Tensor] | None:
    """First column of a group's channels in a weight that reads them in their order, on the borders of stripes; the columns."""
    place = next((place for place in group.places if place.tensor == name and place.dim == weight.dim), None)
    if place is None:
        return None
    columns = (place.units >= 0).nonzero().flatten()
    first = int(columns[0])
    straight = len(columns) == group.units and torch.equal(place.units[columns], torch.arange(group.units))
    together = torch.equal(columns, torch.arange(first, first + group.units))
    return (first, columns) if straight and together and first % weight.m == 0 else None


def _search(group: Coupled, sparse: Mapping[str, Sparse], escapes: int) -> Tensor:
    """The order of a group's channels in which all weights that read them keep the most.

    Weights of the pattern that most of them have are searched; what it does to others is counted afterwards.
    """
    rows: dict[tuple[int, int], list[Tensor]] = {}
    for name, weight in sparse.items():
        if (found := _columns(group, name, weight)) is not None:
            matrix = weight.weight.movedim(weight.dim, -1).flatten(0, -2).abs()[:, found[1].to(weight.weight.device)]
            rows.setdefault((weight.n, weight.m), []).append(matrix.float())
    if not rows:
        return torch.arange(group.units)
    n, m = max(rows, key=lambda pattern: sum(len(matrix) for matrix in rows[pattern]))
    return nm_permutation(torch.cat(rows[n, m]), n, m, escapes=escapes)


def _gain(module: nn.Module, group: Coupled, order: Tensor, sparse: Mapping[str, Sparse]) -> float:
    orders = group_orders(module, {group.name: (group, order)})
    return sum(sparse[name].kept(dims) - sparse[name].kept() for name, dims in orders.items() if name in sparse)

"""Which order of a network's channels lets N:M keep the most magnitude: groups found, proven and searched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_peft.structure.coupled.dependency import HEADS, RETURNED, channel_groups, layers_of, tied_outside
from lightning_peft.structure.coupled.drawn_network import TRIALS, DrawnNetwork, failing
from lightning_peft.structure.coupled.heads import attention_heads
from lightning_peft.structure.coupled.network_copy import NetworkCopy
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.reorder import fixed_by, group_orders, reorder, reordered, unit_order
from lightning_peft.weights.maps import plain_tensors, split_name
from lightning_peft.weights.nm_permutation import kept_magnitude, nm_permutation

_MOVED = "the network does not compute the same with them in another order, because the forward moves, mixes or returns them"


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
    prefix = f"{path}." if path else ""
    twin = NetworkCopy(network, path, example)
    heads = list(attention_heads(twin.module))
    found, whole = channel_groups(twin, layers_of(heads), {name.removeprefix(prefix) for name in excused})
    left = {prefix + name: why for name, why in whole.items() if why not in (RETURNED, HEADS)}
    groups = []
    for group in found:
        named = group.under(path)
        if not any(_reads(named, name, weight) for name, weight in sparse.items()):
            continue
        reason = _fixed(module, named, frozen) or tied_outside(module, path, group)
        groups += [] if reason else [group]
        left |= {named.name: reason} if reason else {}
    if groups:
        wrong = failing(groups, _Proof(network, twin.name, example).fault)
        groups = [group for group in groups if group.name not in wrong]
        left |= {prefix + name: why for name, why in wrong.items()}
    console = Console(stderr=True)  # of its own: Lightning's progress bar may be live on the common one
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        chosen = {}
        for group in bar.track(groups, description="channel orders"):
            named = group.under(path)
            order = _search(named, sparse, escapes)
            if _gain(module, named, order, sparse) > 0:
                chosen[group.name] = (named, order)
    orders = group_orders(module, chosen)
    new = [Sparse(reordered(weight.weight, orders.get(name, {})), *weight[1:]) for name, weight in sparse.items()]
    return ChannelOrder(orders, kept_share(sparse.values()), kept_share(new), len(chosen), left)


def kept_share(weights: Collection[Sparse]) -> float:
    """Share of the magnitude of weights that their patterns keep."""
    return sum(weight.kept() for weight in weights) / (sum(weight.total() for weight in weights) or 1.0)


def _reads(group: Coupled, name: str, weight: Sparse) -> bool:
    return any(place.tensor == name and place.dim == weight.dim for place in group.places)


def _fixed(module: nn.Module, group: Coupled, frozen: Callable[[Tensor], bool]) -> str | None:
    """Why the channels of a group stay where they are."""
    tensors = plain_tensors(module)
    held = next((place.tensor for place in group.places if frozen(tensors[place.tensor])), None)
    if held is not None:
        return f"{held} is frozen"
    for place in group.places:
        try:
            unit_order(place.units, torch.arange(group.units))
        except ValueError as error:
            return f"{error} in {place.tensor}"
    return fixed_by(module, group)


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


class _Proof:
    """Compares a network with random weights to its copy with the channels of groups in another order."""

    def __init__(self, network: nn.Module, name: str, example: Mapping[str, Any]) -> None:
        self.drawn = DrawnNetwork(network, name, example, "The order of channels")

    def fault(self, groups: Sequence[Coupled]) -> str | None:
        """Say what is wrong with the order of some groups together."""
        for self.drawn.trial in range(TRIALS):
            generator = torch.Generator().manual_seed(self.drawn.trial)
            orders = {group.name: (group, torch.randperm(group.units, generator=generator)) for group in groups}
            other = copy.deepcopy(self.drawn.whole)
            try:
                reorder(other, group_orders(other, orders))
                found, whole = self.drawn.output(other, other), self.drawn.output(self.drawn.whole, self.drawn.whole)
            except Exception as error:
                return f"the network fails with them in another order, with {type(error).__name__}: {error}"
            moved = {split_name(place.tensor)[0] for group in groups for place in group.places if place.written}
            if not found.agrees(whole, without=moved):
                return _MOVED
        return None

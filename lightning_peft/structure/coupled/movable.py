"""Groups of coupled channels that can change places: found, and proven on the network itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.structure.coupled.dependency import HEADS, RETURNED, channel_groups, layers_of, tied_outside
from lightning_peft.structure.coupled.drawn_network import TRIALS, DrawnNetwork, failing
from lightning_peft.structure.coupled.heads import attention_heads
from lightning_peft.structure.coupled.network_copy import NetworkCopy
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.reorder import fixed_by, group_orders, reorder, unit_order
from lightning_peft.weights.maps import plain_tensors, split_name

_MOVED = "the network does not compute the same with them in another order, because the forward moves, mixes or returns them"


@dataclass(frozen=True)
class Movable:
    """What can change places in a network.

    Attributes:
        groups: The groups, by their names in the module.
        left: Why others cannot, by the name of the layer that makes them.
    """

    groups: list[Coupled]
    left: dict[str, str]


def movable_groups(
    module: nn.Module,
    path: str,
    network: nn.Module,
    example: Mapping[str, Any],
    *,
    wanted: Callable[[Coupled], bool] = lambda _: True,
    frozen: Callable[[Tensor], bool] = lambda _: False,
    excused: Collection[str] = (),
    heads: bool = False,
) -> Movable:
    """Find groups, and prove that the network computes the same with all of them in another order.

    Args:
        module: The module.
        path: Qualified name of the network in it.
        network: The network.
        example: What it is called with.
        wanted: Whether a group, by its names in the module, is of interest.
        frozen: Whether a parameter is to stay as it is.
        excused: Qualified names of layers that need not take part in a call of the network.
        heads: Whether attention heads are of interest too.

    Raises:
        MisconfigurationException: Torch-Pruning is missing, or the network cannot be traced or called on its own.
    """
    prefix = f"{path}." if path else ""
    twin = NetworkCopy(network, path, example)
    attended = list(attention_heads(twin.module))
    found, whole = channel_groups(twin, layers_of(attended), {name.removeprefix(prefix) for name in excused})
    left = {prefix + name: why for name, why in whole.items() if why not in (RETURNED, HEADS)}
    groups = []
    for group in [*found, *(attended if heads else ())]:
        named = group.under(path)
        if wanted(named):
            reason = _fixed(module, named, frozen) or tied_outside(module, path, group)
            groups += [] if reason else [group]
            left |= {named.name: reason} if reason else {}
    if groups:
        wrong = failing(groups, _Proof(network, twin.name, example).fault)
        groups = [group for group in groups if group.name not in wrong]
        left |= {prefix + name: why for name, why in wrong.items()}
    return Movable([group.under(path) for group in groups], left)


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

"""Weight matching: the channels of one network in the order in which its weights are nearest to another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.merging.errors import MergeError
from lightning_peft.structure.coupled.example import record
from lightning_peft.structure.coupled.movable import movable_groups
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.reorder import group_orders, reorder, reordered
from lightning_peft.weights.detach import attachments
from lightning_peft.weights.maps import plain_tensors

_GAIN = 1e-9  # of the squared norms, below which a gain is rounding


@dataclass(frozen=True)
class Matching:
    """What weight matching did.

    Attributes:
        groups: Groups of channels that were matched.
        sweeps: How often all of them were gone through.
        similarity: Inner product of both networks' weights after each sweep, the first one before it; it never falls.
        left: Why the channels of other layers stayed where they are, by the name of the layer that makes them.
    """

    groups: int
    sweeps: int
    similarity: tuple[float, ...]
    left: dict[str, str]


@torch.no_grad()
def match_weights(
    network: nn.Module,
    reference: nn.Module | Mapping[str, Tensor],
    *inputs: Any,
    seed: int = 0,
    sweeps: int = 100,
    **keywords: Any,
) -> Matching:
    r"""Put the channels of a network into the order that brings its weights nearest to a reference's (Ainsworth et al., 2023).

    The network computes what it did. Trained from another start than the reference, it can be averaged with it afterwards:
    ``match_weights(b, a, batch)``, then ``lightning_peft.merge([a.state_dict(), b.state_dict()])``. Algorithm 1 of *Git
    Re-Basin* (ICLR 2023, https://arxiv.org/abs/2209.04836): group by group, in a drawn order, the assignment that maximises
    :math:`\langle W_a, P W_b \rangle` over all weights that the group has coordinates in, until a sweep gains nothing.

    Which channels belong together, and that they can change places, is found in a call of the network itself and proven on
    it, so no architecture has to be described. Heads of attentions move as wholes.

    Args:
        network: The network that is changed, in place.
        reference: A network of the same class, or its state dict.
        *inputs: What the network is called with: a batch.
        seed: Of the order in which groups are gone through.
        sweeps: The most sweeps.
        **keywords: What it is called with by keyword.

    Returns:
        What was done.

    Raises:
        MergeError: The reference has other tensors; or maps or parts of a method are on the network.
        MisconfigurationException: Torch-Pruning or SciPy is missing, or the network cannot be traced.

    Example:
        >>> one = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> other = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> match_weights(other, one, torch.ones(1, 3)).groups
        1
    """
    if on := next(iter(attachments(network)), None):
        raise MergeError(f"{on.method!r} is on the network. Bake it first: lightning_peft.bake(network).")
    target = plain_tensors(reference) if isinstance(reference, nn.Module) else reference
    own = plain_tensors(network)
    _check(own, target)
    found = movable_groups(network, "", network, record(inputs, keywords), heads=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    matched = _Matched(network, {name: target[name].to(own[name].device) for name in weights})
    similarity = [matched.similarity(weights)]
    while len(similarity) <= sweeps:
        order = torch.randperm(len(found.groups), generator=generator).tolist()
        moved = [matched.improve(found.groups[place]) for place in order]
        if not any(moved):
            break
        similarity.append(matched.similarity(weights))
    return Matching(len(found.groups), len(similarity) - 1, tuple(similarity), found.left)


class _Matched:
    """A network beside the weights it is matched with."""

    def __init__(self, network: nn.Module, target: Mapping[str, Tensor]) -> None:
        self._network, self._target = network, target

    def similarity(self, names: set[str]) -> float:
        """Inner product of the weights of both."""
        tensors = plain_tensors(self._network)
        return float(sum((tensors[name].double() * self._target[name].double()).sum() for name in sorted(names)))

    def improve(self, group: Coupled) -> bool:
        """Assign the units of a group anew, if weights get nearer by it."""
        affinity = self._affinity(group)
        order = _assignment(affinity)
        if bool((order == torch.arange(len(order))).all()):
            return False
        orders = group_orders(self._network, {group.name: (group, order)})
        names = {name for name in orders if name in self._target}
        tensors = plain_tensors(self._network)
        before = self.similarity(names)
        after = sum(
            float((reordered(tensors[name], orders[name]).double() * self._target[name].double()).sum()) for name in names
        )
        # Where a weight makes and reads the same channels, the assignment is of one side alone, and may lose on both.
        size = sum(float(self._target[name].double().square().sum()) for name in names)
        if after - before <= _GAIN * size:
            return False
        reorder(self._network, orders)
        return True

    def _affinity(self, group: Coupled) -> Tensor:
        """Inner products of what belongs to each unit of the reference and of the network, ``(units, units)``."""
        affinity = torch.zeros(group.units, group.units)
        for one, two in self._sides(group):
            affinity += (one @ two.T).cpu()
        return affinity

    def _sides(self, group: Coupled) -> Iterator[tuple[Tensor, Tensor]]:
        """The coordinates of units in each weight, as rows, of the reference and of the network."""
        tensors = plain_tensors(self._network)
        seen: set[tuple[int, int]] = set()
        for place in group.places:
            if place.tensor not in self._target or (id(tensors[place.tensor]), place.dim) in seen:
                continue
            seen.add((id(tensors[place.tensor]), place.dim))
            yield tuple(_rows(each, place.dim, place.units) for each in (self._target[place.tensor], tensors[place.tensor]))  # type: ignore[misc]


def _rows(weight: Tensor, dim: int, units: Tensor) -> Tensor:
    """Numbers of each unit as a row."""
    order = units.argsort(stable=True)[int((units < 0).sum()) :].to(weight.device)
    rows = weight.float().movedim(dim, 0).flatten(1) if weight.dim() > 1 else weight.float()[:, None]
    return rows.index_select(0, order).reshape(int(units.max()) + 1, -1)


def _assignment(affinity: Tensor) -> Tensor:
    """Return for each unit of the reference the one of the network that takes its place."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MisconfigurationException("Weight matching assigns channels with SciPy: pip install scipy.") from error
    return torch.from_numpy(linear_sum_assignment(affinity.numpy(), maximize=True)[1])


def _check(own: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in own.items():
        if name not in target or target[name].shape != tensor.shape:
            has = f"is {tuple(target[name].shape)} in it" if name in target else "is not in it"
            raise MergeError(
                f"The reference is of another architecture: {name}, {tuple(tensor.shape)} in the network, {has}. Weight "
                "matching finds an order of channels; it does not change their number."
            )
        if not bool(torch.isfinite(tensor).all() & torch.isfinite(target[name]).all()):
            raise MergeError(f"{name} holds numbers that are not finite, so it cannot be matched.")

"""What a plan asks of the hooks that methods override: that somebody calls them, and in an order that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.contract import Contract, goes_after, overrides

_LANE_OF = {"first_edit": Lane.STRUCTURE, "next_edit": Lane.STRUCTURE, "adapt": Lane.ADAPT}
"""Hooks that methods of one lane alone are asked for."""

_SHARED = {
    Resource.GRADIENT: ("compute_gradients", "before_step", "after_clipping"),
    Resource.OPTIMIZER: ("wrap_optimizer",),
}
"""Hooks in which several methods may write one thing, one after the other."""


class ConflictError(MisconfigurationException):
    """Two methods cannot work on one module as they are configured."""


def check_hooks(method: Contract) -> None:
    """Refuse a method that overrides a hook which is never called in its lane.

    Raises:
        MisconfigurationException: Names the hook and the lane.
    """
    for hook, lane in _LANE_OF.items():
        if overrides(method, hook) and method.lane != lane:
            raise MisconfigurationException(
                f"{type(method).__name__} overrides {hook}(), which is called in lane {lane.name} alone, and its lane is "
                f"{method.lane.name}. Write lane = Lane.{lane.name}, or leave {hook}() out."
            )


def check_order(methods: Sequence[Contract], claims: Mapping[str, Sequence[str]]) -> None:
    """Refuse methods whose effect on one thing would depend on how they are called: the alphabet is no reason.

    Lanes and hooks tell who comes first; so does ``after``. Writers that commute, and those of different tensors, need no
    order. A method that reads gradients beside one that changes them needs one as two writers do.

    Args:
        methods: All methods, in plan order.
        claims: Names of the tensors each acts on, by the method's name; none means all.

    Raises:
        ConflictError: Two of them do, or say the opposite of what their lanes do.
    """
    _check_after(methods)
    for one, other in combinations(methods, 2):
        for resource, hooks in _SHARED.items():
            both = [hook for hook in hooks if overrides(one, hook) and overrides(other, hook)]
            if both and one.lane == other.lane and _meet(one, other, resource) and not _apart(one, other, claims):
                raise ConflictError(
                    f"{one.name} and {other.name} both act on the {resource.value} in {both[0]}(), and the result depends on "
                    "which acts first. Set the order on the method that acts last, before the Trainer is made: "
                    f'<{other.name}>.after = ("{one.name}",) or <{one.name}>.after = ("{other.name}",). Or remove one of '
                    "them."
                )


def _meet(one: Contract, other: Contract, resource: Resource) -> bool:
    """Whether one writes what the other reads or writes, without an order and without commuting."""
    if goes_after(one, other) or goes_after(other, one):
        return False
    writing = [resource in method.writes_now() for method in (one, other)]
    if all(writing):
        return not (one.commutes and other.commutes)
    return any(writing) and any(resource in method.reads_now() for method in (one, other))


def _apart(one: Contract, other: Contract, claims: Mapping[str, Sequence[str]]) -> bool:
    """Whether two methods act on different tensors."""
    ours, theirs = claims[one.name], claims[other.name]
    return bool(ours) and bool(theirs) and set(ours).isdisjoint(theirs)


def _check_after(methods: Sequence[Contract]) -> None:
    for one, other in combinations(methods, 2):
        if one.lane < other.lane and goes_after(one, other):
            raise ConflictError(
                f"{one.name} is set to act after {other.name}, but its lane {one.lane.name} comes before {other.lane.name}. "
                f"Take the name out of {one.name}.after."
            )

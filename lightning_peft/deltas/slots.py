"""The slots in which members of the deltas' family differ, and the member with given names in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import registry
from lightning_peft.arguments import one_of
from lightning_peft.method import Method

FAMILY = "deltas"


@dataclass(frozen=True)
class Slots:
    """What a member puts in each slot, as its class attribute ``slots``; the defaults are LoRA's.

    A member with several names in a slot takes the choice as an argument that is called as the slot is.

    Attributes:
        form: What is added to a weight.
        init: Its first values.
        control: What changes the rank in training.
        rule: A term of the loss, or another update rule.
    """

    form: tuple[str, ...] = ("lora",)
    init: tuple[str, ...] = ("lora",)
    control: tuple[str, ...] = ()
    rule: tuple[str, ...] = ()


def LowRank(  # noqa: N802
    rank: int | None = None,
    alpha: float | None = None,
    *,
    form: str | None = None,
    init: str | None = None,
    control: str | None = None,
    rule: str | None = None,
    **arguments: Any,
) -> Method:
    """Make the member of the deltas' family that has these names in its slots; ``LowRank()`` is ``LoRA()``.

    Args:
        rank: Rank of the deltas, the member's default if it is not given.
        alpha: Numerator of the scale, likewise.
        form: What is added to a weight: ``"lora"``, ``"dora"``, ``"core"``, ``"triplet"``, ...
        init: Its first values: ``"lora"``, ``"pissa"``, ``"olora"``, ``"eva"``, ``"corda"``, ...
        control: What changes the rank in training: ``"adalora"``, ``"dylora"``, ``"increlora"``, ``"triadaptlora"``.
        rule: A term of the loss, or another update rule: ``"sorsa"``, ``"ba-lora"``, ``"pego"``, ...
        **arguments: What else the member takes.

    Raises:
        MisconfigurationException: A name is unknown, or no member, or more than one, has them all; those that are near are
            listed.

    Example:
        >>> LowRank(4, form="dora", init="pissa")
        DoRA(rank=4, scaling='rank', init='pissa', ...)
        >>> LowRank(4, init="eva", form="dora", looks=2)
        EVA(rank=4, looks=2, ..., form='dora', ...)
    """
    named = {"form": form, "init": init, "control": control, "rule": rule}
    asked = {slot: name for slot, name in named.items() if name is not None}
    member = _member(asked)
    chosen = {slot: name for slot, name in asked.items() if len(getattr(member.slots, slot)) > 1}
    given = {name: value for name, value in (("rank", rank), ("alpha", alpha)) if value is not None}
    made: Method = member(**given, **chosen, **arguments)
    return made


def _member(asked: Mapping[str, str]) -> Any:
    """The only member with what is asked for, or the only one that is LoRA in all that is not."""
    entries = [entry for entry in registry.installed().values() if entry.family == FAMILY]
    family: list[Any] = [loaded for entry in entries if getattr(loaded := entry.load(), "slots", None)]
    for slot, name in asked.items():
        one_of(slot, name, sorted({each for member in family for each in getattr(member.slots, slot)}))
    having = [{slot for slot, name in asked.items() if name in getattr(member.slots, slot)} for member in family]
    fitting = [member for member, has in zip(family, having, strict=True) if has == asked.keys()]
    lora = _first(Slots())
    plain = [each for each in fitting if all(slot in asked or name == lora[slot] for slot, name in _first(each.slots).items())]
    found = fitting if len(fitting) == 1 else plain
    if len(found) == 1:
        return found[0]
    words = " and ".join(f"{slot}={name!r}" for slot, name in asked.items())
    if fitting:
        raise MisconfigurationException(f"Several members have {words}. Name one more slot of {_listed(fitting)}.")
    near = [member for member, has in zip(family, having, strict=True) if has]
    raise MisconfigurationException(f"No member of the family has {words}. There are {_listed(near)}.")


def _first(slots: Slots) -> dict[str, str | None]:
    """The first name in each slot, which is the member's default."""
    return {slot: next(iter(names), None) for slot, names in asdict(slots).items()}


def _listed(members: list[Any]) -> str:
    """Members with what is in their slots, as it is written in a call."""

    def call(member: Any) -> str:
        named = {slot: " or ".join(map(repr, names)) for slot, names in asdict(member.slots).items() if names}
        return f"{member.__name__} ({', '.join(f'{slot}={names}' for slot, names in named.items())})"

    return ", ".join(map(call, members))

"""How large a network is to be: blocks, and units of the axes it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException

DEPTH = "depth"

Size: TypeAlias = dict[str, int]
"""Target by axis: ``{"depth": 12, "width": 384}``; empty for what was built."""

To: TypeAlias = "int | Mapping[str, int] | Sequence[int | Mapping[str, int]] | None"


def read_sizes(to: To, events: int, start: int | None) -> list[Size]:
    """Read what a user gave as ``to=``, one size for each event.

    Raises:
        MisconfigurationException: Not one for each event, no positive integers, or nothing to grow to.

    Example:
        >>> read_sizes([4, {"width": 32}], 2, None)
        [{'depth': 4}, {'width': 32}]
    """
    if to is None:
        if start is None:
            raise MisconfigurationException(
                "Say what to grow to: to=<blocks>, or start=<blocks> to begin small and grow to what was built."
            )
        sizes: list[Size] = [{}]
    else:
        entries = [to] if isinstance(to, (int, Mapping)) else list(to)
        sizes = [dict(entry) if isinstance(entry, Mapping) else {DEPTH: entry} for entry in entries]
    if len(sizes) != events:
        raise MisconfigurationException(f"at= names {events} events and to= {len(sizes)} sizes; give one size for each event.")
    for size in sizes:
        for axis, units in size.items():
            if type(units) is not int or units < 1:
                raise MisconfigurationException(f"to={{{axis!r}: {units!r}}}: a size is a positive number of {axis}.")
    return sizes


def width_of(size: Size) -> Size:
    """The axes of a size that are no depth.

    Example:
        >>> width_of({"depth": 4, "width": 32})
        {'width': 32}
    """
    return {axis: units for axis, units in size.items() if axis != DEPTH}

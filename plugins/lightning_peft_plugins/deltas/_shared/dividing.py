"""Weights that are cut into equal blocks."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.deltas.sides import Place


def check_divides(found: Sequence[Place], argument: str, size: int, instead: str) -> None:
    """See that both sides of every weight can be cut into blocks of a size.

    Args:
        found: The weights.
        argument: Name of the argument that gives the size.
        size: The size.
        instead: What needs no such blocks.

    Raises:
        MisconfigurationException: One cannot; all that cannot are named.
    """
    if odd := [place for place in found if any(side % size for side in place.layout.matrix_shape[-2:])]:
        raise MisconfigurationException(
            f"{argument}={size} does not divide both sides of {odd[0].tensor}, {tuple(odd[0].layout.matrix_shape)}. Give a "
            f"number that does, or leave the layer out: exclude={[place.path for place in odd]!r} beside what is excluded now. "
            f"{instead} needs no such number."
        )

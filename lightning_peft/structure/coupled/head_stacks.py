"""Attentions that hand something with a number for each head on to one another, so that their heads are one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lightning_peft.structure.coupled.units import Coupled


def stacked_heads(network: nn.Module, heads: Iterable[Coupled]) -> list[Coupled]:
    """Couple the heads of attentions of one class and place in their blocks, where some hold a table that others lack.

    The first block of T5 holds the table of positions that all blocks add to their scores, so a head leaves all of them or
    none. Where one attention of a class does so, others of that class hand on what stands for the table (the cross attention
    of T5 adds zeros). As with every group, whether it is so is proven by whoever acts on it.

    Args:
        network: The network.
        heads: Heads by attention, by name in the network.
    """
    families: dict[tuple[str, type[nn.Module], int], list[Coupled]] = {}
    for group in heads:
        place = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", group.name)
        families.setdefault((place, type(network.get_submodule(group.name)), group.units), []).append(group)
    sharing = {kind for (_, kind, _), groups in families.items() if len({_holds_table(group) for group in groups}) > 1}
    found = []
    for (_, kind, units), groups in families.items():
        if kind not in sharing:
            found += groups
            continue
        places = [place for group in groups for place in group.places]
        found.append(Coupled(groups[0].name, "heads", units, places, [n for group in groups for n in group.numbers]))
    return found


def _holds_table(group: Coupled) -> bool:
    return any(not place.scored and not place.written for place in group.places)

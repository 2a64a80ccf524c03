"""The lists of residual blocks in a network, and which of their blocks may leave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.network.block_lists import as_list, entry_names, find_lists, is_trunk
from lightning_peft.network.targets import TargetSpec, select
from lightning_peft.structure.forms import Form, dict_of, fields, list_of, whole


@dataclass
class PrunableList:
    """A list some of whose blocks may leave, by position.

    Attributes:
        blocks: Positions of its blocks; what else stands in a list (a stem, an activation) is none.
        may_go: Those of them that may leave.
        named: Those that ``targets=`` names one by one.
    """

    blocks: list[int]
    may_go: list[int]
    named: list[int]

    def without(self, sources: list[int]) -> PrunableList:
        """Return the list that is left of it, from the old position of every entry that stays.

        Example:
            >>> PrunableList([1, 2, 3], [1, 3], [3]).without([0, 1, 3])
            PrunableList(blocks=[1, 2], may_go=[1, 2], named=[2])
        """
        now = {old: new for new, old in enumerate(sources)}
        return PrunableList(*([now[old] for old in places if old in now] for places in (self.blocks, self.may_go, self.named)))


def lists_form(tensors: Mapping[str, Tensor] | None) -> Form:
    """Form of the lists in a checkpoint: positions of blocks that the module has, those that may go among them."""
    form = dict_of(fields(dict.fromkeys(("blocks", "may_go", "named"), list_of(whole()))))

    def check(value: Any, place: str) -> str | None:
        if (found := form(value, place)) is not None:
            return found
        for path, places in value.items():
            known = places["blocks"] if tensors is None else _with_tensors(tensors, path)
            lost = next((block for block in places["blocks"] if block not in known), None)
            if lost is not None:
                return f"{place}[{path!r}] names {path}.{lost}, which is not a block of the module"
            if not set(places["named"]) <= set(places["may_go"]) <= set(places["blocks"]):
                return f"{place}[{path!r}] lists blocks to remove that it does not have"
        return None

    return check


def _with_tensors(tensors: Iterable[str], path: str) -> set[int]:
    """Positions of the entries of a list that have tensors; where names have a prefix they may count from one."""
    matches = [match for name in tensors if (match := re.match(rf"{re.escape(path)}\.([^.]*?)(\d+)\.", name))]
    return {int(match[2]) - less for match in matches for less in (range(2) if match[1] else range(1))}


def residual_lists(network: nn.Module, name: str = "") -> dict[str, list[int]]:
    """Find the lists that look like a trunk of blocks, with the positions of the blocks; ``name`` is the network's."""
    return {path: found.blocks for path, found in find_lists(network, is_trunk, name).items()}


def lists_to_prune(
    module: nn.Module, network: str, targets: TargetSpec | None, exclude: TargetSpec | None
) -> dict[str, PrunableList]:
    """Find the lists of a network and which of their blocks may leave.

    A block that alone has certain parameters may leave only if it is named itself.

    Args:
        module: The LightningModule.
        network: Qualified name of the network in it.
        targets: Lists or blocks that may go; ``None`` for all.
        exclude: Lists or blocks that stay; lists are left out altogether.

    Raises:
        MisconfigurationException: There is none, or the arguments name none.
    """
    found = residual_lists(module.get_submodule(network), network)
    wanted = None if targets is None else set(select(module, targets))
    if wanted is not None and wanted.isdisjoint(_names(module, found)):
        found = _named_lists(module, wanted) or found
    kept = set() if exclude is None else set(select(module, exclude))
    for argument, given, names in (("targets", targets, wanted), ("exclude", exclude, kept)):
        if given is not None and not names & set(_names(module, found)):
            shown = ", ".join(f"{path!r} ({len(places)} blocks)" for path, places in found.items()) or "none"
            raise MisconfigurationException(
                f"{argument}={given!r} is neither a residual block nor a list of them. Name a list, or a block as "
                f'"<list>.<number>". Lists: {shown}.'
            )
    lists = {}
    for path, places in found.items():
        names = dict(zip(places, entry_names(module, path, places), strict=True))
        named = [place for place in places if wanted is not None and names[place] in wanted]
        alone = _alone(module, names)
        every = [place for place in places if place not in alone or place in named]
        chosen = every if wanted is None or path in wanted else named
        may_go = [place for place in chosen if names[place] not in kept]
        if path not in kept and may_go:
            lists[path] = PrunableList(places, may_go, [place for place in named if place in may_go])
    if not lists:
        raise MisconfigurationException(
            f"{type(module).__name__} has no list of residual blocks that can be removed: an nn.ModuleList or nn.Sequential, "
            "numbered, with at least two blocks of one class, each made of layers. "
            + ("Name it with targets=." if targets is None and exclude is None else "Widen targets= or narrow exclude=.")
        )
    return lists


def _alone(module: nn.Module, names: Mapping[int, str]) -> list[int]:
    """Blocks with parameters that no other has, for the others may need them: T5's first holds the positions of all."""
    own = {place: {key for key, _ in module.get_submodule(name).named_parameters()} for place, name in names.items()}
    return [place for place in own if own[place].difference(*(own[other] for other in own if other != place))]


def _names(module: nn.Module, found: Mapping[str, list[int]]) -> Iterator[str]:
    for path, places in found.items():
        yield path
        yield from entry_names(module, path, places)


def _named_lists(module: nn.Module, wanted: set[str]) -> dict[str, list[int]]:
    """Lists that were not taken for a trunk, but are named, or one of their blocks is; outermost only."""
    found: dict[str, list[int]] = {}
    for path, child in module.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        blocks = as_list(child)
        places = blocks.blocks if blocks is not None and blocks.numbered else []
        if len(places) > 1 and not wanted.isdisjoint(_names(module, {path: places})):
            found[path] = places
    return found

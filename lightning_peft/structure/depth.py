"""Depth edits: which blocks a list of equal blocks holds.

The new list is written as the old position of every block: ``[0, 1, 0, 1]`` stacks two blocks, ``[0, 0, 1, 1]`` interpolates,
``[0]`` drops the second. The first block that names an old position is that block itself, later ones are copies, unless the
edit is ``"shared"``: then every one of them is the block itself, with one set of tensors. A later edit that is not shared gives
each position a block of its own again.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, TypeAlias

from torch import nn

from lightning_peft.network.block_lists import Numbering, signature, ties
from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.structure import depth_settings as settings
from lightning_peft.structure.block_names import block_name, numbering_of
from lightning_peft.structure.block_positions import Noted, Positions, positions, undo_noted
from lightning_peft.structure.edit_types import BlocksEdit, Recorded
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.weights.detach import detach_maps

Blocks: TypeAlias = "nn.ModuleList | nn.Sequential"


def blocks_at(module: nn.Module, path: str) -> Blocks:
    """Return the list of blocks called ``path``.

    Raises:
        CheckpointError: There is none, or the names of its blocks do not count.
    """
    try:
        found = module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{type(module).__name__} has no submodule {path!r}, whose blocks should change.") from None
    if not isinstance(found, (nn.ModuleList, nn.Sequential)):
        raise CheckpointError(f"{path} is a {type(found).__name__}; blocks are changed in a ModuleList or Sequential only.")
    if empty := [name for name, entry in found._modules.items() if entry is None]:
        raise CheckpointError(f"{path} leaves a place empty ({empty[0]!r} is None), so what its blocks are cannot be known.")
    if Numbering.of(found._modules) is None:
        name = next(name for place, name in enumerate(found._modules) if name != str(place))
        raise CheckpointError(
            f"{path} is a {type(found).__name__} whose entries have names of their own that do not count ({name!r}); what a "
            "new block would be called cannot be known. Number them where the module is built, say in its __init__: "
            f"self.{path} = nn.Sequential(*self.{path}). Names of weights change with it."
        )
    return found


def blocks_edit(
    module: nn.Module,
    path: str,
    sources: Sequence[int],
    *,
    rates: Mapping[str, Sequence[float]] | None = None,
    shared: bool = False,
    check: str = "class",
) -> BlocksEdit:
    """Describe a new list of blocks.

    Args:
        module: The module.
        path: Qualified name of the list.
        sources: Old position of every new block.
        rates: Stochastic-depth rates of the new blocks, by the name of the layer in the block; by default the line of the old
            ones is drawn through the new ones.
        shared: Whether positions with one source hold one block.
        check: ``"class"``: the network's own class must be able to build what the edit leads to, if it is built from a
            configuration; ``"off"``: it need not.

    Returns:
        The edit, plain data.

    Raises:
        CheckpointError: The class cannot; the error names the first difference.
    """
    blocks = blocks_at(module, path)
    kin = ties(blocks)
    old_rates = settings.drop_rates(list(blocks))
    if rates is None:
        rates = {name: settings.redrawn(values, len(sources)) or [] for name, values in old_rates.items()}
    edit: BlocksEdit = {
        "op": "blocks",
        "path": path,
        "from": len(blocks),
        "sources": [kin[source] for source in sources],
        "block": sorted({signature(block) for block in blocks}),
        "rates": {name: [float(rate) for rate in values] for name, values in rates.items() if len(values)},
        "old_rates": old_rates,
    }
    numbering = _numbering(blocks)
    if numbering != Numbering():
        edit["numbering"] = [numbering.prefix, numbering.first]
    if shared:
        edit["shared"] = True
    if kin != list(range(len(kin))):
        edit["tied"] = kin
    if check == "off":
        edit["check"] = check
    else:
        positions(module, path, edit["sources"], shared=shared)
    return edit


def check_blocks(module: nn.Module, edit: Recorded) -> None:
    """Refuse an edit that does not fit.

    Raises:
        CheckpointError: Malformed, or made on another list.
    """
    path, count, sources, kinds = (edit.get(key) for key in ("path", "from", "sources", "block"))
    if not isinstance(path, str) or type(count) is not int or not isinstance(sources, list) or not isinstance(kinds, list):
        raise CheckpointError("A recorded change of blocks is malformed: it needs 'path', 'from', 'sources' and 'block'.")
    if not sources or not all(type(source) is int and 0 <= source < count for source in sources):
        raise CheckpointError(
            f"A recorded change of {path} names blocks {reprlib.repr(sources)} of {count}; they count from 0."
        )
    settings.check_rates(edit)
    blocks = blocks_at(module, path)
    now = sorted({signature(block) for block in blocks})
    if len(blocks) != count or now != kinds:
        raise CheckpointError(
            f"A change of {path} was made on {count} blocks of {_kinds(kinds)}; this {type(module).__name__} has {len(blocks)} "
            f"of {_kinds(now)}. Build the model with the arguments it was trained with, from the same version of its class."
        )
    if numbering_of(edit) != _numbering(blocks):
        raise CheckpointError(
            f"A change of {path} was made on entries of which the first is {block_name(edit, 0)}; in this "
            f"{type(module).__name__} it is {next(iter(blocks._modules))!r}. Build the model from the version of its class "
            "that it was trained with."
        )
    if edit.get("tied", list(range(count))) != ties(blocks):
        raise CheckpointError(
            f"A change of {path} was made on a list in which other blocks are the same one: {reprlib.repr(edit.get('tied'))} "
            f"against {reprlib.repr(ties(blocks))}. The record is damaged, or the model's class shares blocks and did not then."
        )


def _kinds(kinds: Sequence[str]) -> str:
    return " and ".join(f"{name} (shapes {digest})" for name, _, digest in (str(kind).partition(":") for kind in kinds))


def set_blocks(module: nn.Module, edit: BlocksEdit) -> tuple[dict[str, str], dict[str, str], dict[str, nn.Module], Noted]:
    """Put the new list in place.

    Returns:
        Old to new prefix of blocks that moved, new prefix of copies to the old prefix of their source, blocks that left, by
        old prefix, and what gives back what was noted about them.

    Raises:
        CheckpointError: The network's class cannot build the new list; nothing is changed.
    """
    path, sources = edit["path"], edit["sources"]
    placed = _positions(module, edit, sources)
    blocks = blocks_at(module, path)
    old, kin = list(blocks), ties(blocks)
    first = _first_places(sources)
    masked = not edit.get("follow")
    new = [
        old[source] if first[source] == place or edit.get("shared") else copied(old[source], masked=masked)
        for place, source in enumerate(sources)
    ]
    noted = [] if placed is None else placed.before(module, new)
    _fill(blocks, new)
    settings.settle(module, path, sources, edit["from"], edit["rates"], counts=placed is None)
    if placed is not None:
        placed.write(module, new)
    moved = {place: first[source] for place, source in enumerate(kin) if source in first}
    renamed = {block_name(edit, place): block_name(edit, now) for place, now in moved.items() if place != now}
    copies = {
        block_name(edit, place): block_name(edit, source) for place, source in enumerate(sources) if first[source] != place
    }
    removed = {block_name(edit, place): block for place, block in enumerate(old) if place not in moved}
    return renamed, {} if edit.get("shared") else copies, removed, noted


def _positions(module: nn.Module, edit: BlocksEdit, sources: Sequence[int]) -> Positions | None:
    if edit.get("check") == "off":
        return None
    return positions(module, edit["path"], sources, shared=bool(edit.get("shared")))


def _first_places(sources: Sequence[int]) -> dict[int, int]:
    return {source: place for place, source in reversed(list(enumerate(sources)))}


def undo_blocks(module: nn.Module, edit: BlocksEdit, removed: Mapping[str, nn.Module], noted: Noted | None = None) -> None:
    """Put the old list back; removed blocks that are not at hand become copies."""
    path, sources = edit["path"], edit["sources"]
    blocks = blocks_at(module, path)
    now, first = list(blocks), _first_places(sources)
    kin = edit.get("tied", list(range(edit["from"])))
    device = next((tensor.device for tensor in blocks.parameters()), None)
    for block in removed.values():
        block.to(device)  # what was removed in a training waits on the CPU
    back = [first.get(place, 0) for place in kin]
    old = {
        place: now[first[place]] if place in first else removed.get(block_name(edit, place)) or copied(now[0], masked=False)
        for place in set(kin)
    }
    placed = None if noted else _positions_back(module, edit, back)
    restored = [old[place] for place in kin]
    _fill(blocks, restored)
    settings.settle(module, path, back, len(sources), edit["old_rates"], counts=not noted and placed is None)
    if placed is not None:
        placed.write(module, restored)
    undo_noted(module, noted or [])


def _positions_back(module: nn.Module, edit: BlocksEdit, back: Sequence[int]) -> Positions | None:
    """What the old list has by position, when the edit was made in another process."""
    try:
        return _positions(module, edit, back)
    except CheckpointError:
        return None  # it is what the network was built with; a checkpoint fills it


def copied(block: nn.Module, *, masked: bool) -> nn.Module:
    """Copy a block with its layer parts and without its weight maps; what the block is configured with stays shared.

    Hooks of whoever watches the block, a profiler above all, are left out: he holds the handles of the original alone.

    Args:
        block: The block.
        masked: Whether its weights keep what masks have set to zero.
    """
    shared = [vars(layer)["config"] for layer in block.modules() if "config" in vars(layer)]  # transformers change it later
    shared += [owner for _, _, owner in _watching(block)]
    twin = deep_copy(block, {id(each): each for each in shared})
    for hooks, key, _ in list(_watching(twin)):
        del hooks[key]
    detach_maps(twin, "live" if masked else "unmasked", parts=False)
    _drop_plain_methods(twin)
    return twin


def _watching(block: nn.Module) -> Iterator[tuple[dict[int, Any], int, object]]:
    """Yield the hooks of a block that are methods of objects outside it, each with the dict that holds it and its object."""
    parts = set(block.modules())
    for part in parts:
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(part, name)
            for key, hook in hooks.items():
                method = hook.func if isinstance(hook, functools.partial) else hook
                if isinstance(method, MethodType) and not any(method.__self__ is each for each in parts):
                    yield hooks, key, method.__self__


def _drop_plain_methods(block: nn.Module) -> None:
    """Take off what copying makes of a shadowed method: an attribute that says no more than the class does."""
    for part in block.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, MethodType) and value.__self__ is part and value.__func__ is getattr(type(part), name, None):
                del vars(part)[name]


def _numbering(blocks: Blocks) -> Numbering:
    found = Numbering.of(blocks._modules)
    assert found is not None  # blocks_at
    return found


def _fill(blocks: Blocks, new: Sequence[nn.Module]) -> None:
    numbering = _numbering(blocks)
    blocks._modules.clear()
    for place, block in enumerate(new):
        blocks._modules[numbering.name(place)] = block

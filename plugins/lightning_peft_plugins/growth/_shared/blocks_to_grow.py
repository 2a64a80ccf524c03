"""Choosing the list of equal blocks that makes a network deep."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.network.block_lists import BlockList, as_list, find_lists, is_equal, is_trunk, signature
from lightning_peft.network.plain_class import plain_class
from lightning_peft.network.plain_tensors import plain_tensors

_CLEAR = 4  # a list this many times as large as the next is what "the blocks" means


def block_lists(module: nn.Module) -> dict[str, nn.Module]:
    """Return every list of at least two equal blocks with parameters, outermost only, the largest first.

    A list of blocks among which few differ from the others, say the first, counts too.
    """
    found = {path: module.get_submodule(path) for path in find_lists(module, _has_run)}
    return dict(sorted(found.items(), key=lambda item: -_size(item[1])))


def _has_run(blocks: BlockList) -> bool:
    return is_equal(blocks) or (is_trunk(blocks) and 2 * len(longest_run(blocks.kinds)) > len(blocks.entries))


def longest_run(kinds: Sequence[str]) -> range:
    """Places of the longest run of equal entries, the first of several.

    Example:
        >>> longest_run(["stem", "block", "block", "head"])
        range(1, 3)
    """
    best, start = range(0), 0
    for place in range(1, len(kinds) + 1):
        if place == len(kinds) or kinds[place] != kinds[start]:
            best = max(best, range(start, place), key=len)
            start = place
    return best


def are_equal(module: nn.Module, path: str) -> bool:
    """Whether any block of a list can stand in for any other."""
    return len({signature(block) for block in module.get_submodule(path).children()}) == 1


def run_around(kinds: Sequence[str], place: int) -> range:
    """Places of the run of equal entries that one of them belongs to.

    Example:
        >>> run_around(["stem", "block", "head", "head"], 1)
        range(1, 2)
    """
    start, stop = place, place + 1
    while start > 0 and kinds[start - 1] == kinds[place]:
        start -= 1
    while stop < len(kinds) and kinds[stop] == kinds[place]:
        stop += 1
    return range(start, stop)


def equal_run(module: nn.Module, path: str, around: int | None = None) -> range:
    """Return the places of the blocks of a list that can stand in for one another: all, or the longest run.

    Args:
        module: The module.
        path: Qualified name of the list.
        around: A block that is to be among them, where a training began with fewer of its run.

    Raises:
        MisconfigurationException: No two in a row are equal; names what differs.
    """
    blocks: list[nn.Module] = list(module.get_submodule(path)._modules.values())  # type: ignore[arg-type]
    kinds = [signature(block) for block in blocks]
    if around is not None:
        return run_around(kinds, around)
    run = longest_run(kinds)
    if len(run) < 2 and len(blocks) > 1:
        raise MisconfigurationException(
            f"No two blocks of {path} in a row are equal ({_odd(blocks, 0, 1)}), so copies of one cannot stand beside another. "
            f"Say which block each position copies with sources=[...], or name another list: {', '.join(block_lists(module))}."
        )
    return run


def _odd(blocks: Sequence[nn.Module], odd: int, usual: int) -> str:
    """Say in what a block differs from another one."""
    if plain_class(blocks[odd]) is not plain_class(blocks[usual]):
        return f"block {odd} is a {plain_class(blocks[odd]).__name__}, block {usual} a {plain_class(blocks[usual]).__name__}"
    shapes = [{name: tuple(tensor.shape) for name, tensor in plain_tensors(blocks[at]).items()} for at in (odd, usual)]
    name = next(name for name in sorted({*shapes[0], *shapes[1]}) if shapes[0].get(name) != shapes[1].get(name))
    shown = ["no" if name not in each else f"{list(each[name])} as" for each in shapes]
    return f"block {odd} has {shown[0]} {name}, block {usual} {shown[1]} {name}"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def find_blocks(module: nn.Module, name: str | None = None, within: str = "") -> str:
    """Return the qualified name of the list of blocks to grow.

    Args:
        module: The LightningModule.
        name: What the user called it; ``None`` finds it.
        within: Qualified name of the network, to which ``name`` may be relative.

    Raises:
        MisconfigurationException: There is none, or several are about as large; all are listed.
    """
    lists = block_lists(module)
    shown = ", ".join(f"{path!r} ({len(list(blocks.children()))} blocks)" for path, blocks in lists.items())
    if name is not None:
        for path in (name, f"{within}.{name}" if within else name):
            try:
                found = module.get_submodule(path)
            except AttributeError:
                continue
            blocks = as_list(found)
            if blocks is not None and blocks.entries:
                return path
        raise MisconfigurationException(
            f"blocks={name!r} is not a list of blocks of {type(module).__name__}. Lists of equal blocks: {shown or 'none'}."
        )
    if not lists:
        raise MisconfigurationException(
            f"{type(module).__name__} has no list of equal blocks (an nn.ModuleList or nn.Sequential of at least two modules "
            f'of one class with the same shapes){_nearest(module)}. Name the list to grow with blocks="<qualified name>".'
        )
    paths = list(lists)
    if len(paths) > 1 and _size(lists[paths[0]]) < _CLEAR * _size(lists[paths[1]]):
        raise MisconfigurationException(
            f'{type(module).__name__} has several lists of equal blocks: {shown}. Choose one with blocks="<name>".'
        )
    return paths[0]


def _nearest(module: nn.Module) -> str:
    """Say why the largest list is none of equal blocks."""
    lists = find_lists(module, lambda blocks: blocks.numbered and len(blocks.blocks) > 1)
    if not lists:
        return ""
    path = max(lists, key=lambda path: _size(module.get_submodule(path)))
    blocks = lists[path].entries
    kinds = lists[path].kinds
    odd = next((place for place in range(1, len(kinds)) if kinds[place] != kinds[0]), 0)
    return f"; in the largest, {path}, {_odd(blocks, 0, odd)}" if odd else ""


def check_equal(module: nn.Module, path: str) -> None:
    """Refuse a named list whose blocks cannot stand in for one another.

    Raises:
        MisconfigurationException: Blocks differ in class or shapes.
    """
    blocks: list[nn.Module] = list(module.get_submodule(path)._modules.values())  # type: ignore[arg-type]
    kinds = [signature(block) for block in blocks]
    usual = max(range(len(kinds)), key=lambda place: kinds.count(kinds[place]))
    odd = next((place for place, kind in enumerate(kinds) if kind != kinds[usual]), None)
    if odd is not None:
        others = [name for name in block_lists(module) if name != path]
        raise MisconfigurationException(
            f"The blocks of {path} are not equal: {_odd(blocks, odd, usual)}. So copies of one cannot stand beside another. "
            f"Name another list with blocks=: {', '.join(others) or 'there is none'}."
        )

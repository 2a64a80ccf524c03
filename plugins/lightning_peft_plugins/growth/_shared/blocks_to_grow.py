"""Choosing the list of equal blocks that makes a network deep."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.network.block_lists import find_lists, is_equal, signature

_CLEAR = 4  # a list this many times as large as the next is what "the blocks" means


def block_lists(module: nn.Module) -> dict[str, nn.Module]:
    """Return every list of at least two equal blocks with parameters, outermost only, the largest first."""
    found = {path: module.get_submodule(path) for path in find_lists(module, is_equal)}
    return dict(sorted(found.items(), key=lambda item: -_size(item[1])))


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
            if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found):
                return path
        raise MisconfigurationException(
            f"blocks={name!r} is not a list of blocks of {type(module).__name__}. Lists of equal blocks: {shown or 'none'}."
        )
    if not lists:
        raise MisconfigurationException(
            f"{type(module).__name__} has no list of equal blocks (an nn.ModuleList or nn.Sequential of at least two modules "
            'of one class with the same shapes). Name the list to grow with blocks="<qualified name>".'
        )
    paths = list(lists)
    if len(paths) > 1 and _size(lists[paths[0]]) < _CLEAR * _size(lists[paths[1]]):
        raise MisconfigurationException(
            f'{type(module).__name__} has several lists of equal blocks: {shown}. Choose one with blocks="<name>".'
        )
    return paths[0]


def check_equal(module: nn.Module, path: str) -> None:
    """Refuse a named list whose blocks cannot stand in for one another.

    Raises:
        MisconfigurationException: Blocks differ in class or shapes.
    """
    kinds: dict[str, int] = {}
    for block in module.get_submodule(path).children():
        kinds[signature(block)] = kinds.get(signature(block), 0) + 1
    if len(kinds) > 1:
        shown = ", ".join(f"{count} x {kind.partition(':')[0]}" for kind, count in kinds.items())
        raise MisconfigurationException(
            f"The blocks of {path} are not equal ({shown}, by class and shapes), so copies of one cannot stand beside another. "
            f"Lists of equal blocks: {', '.join(block_lists(module)) or 'none'}."
        )

"""The layers of every block by category: matrices of one part of the block, matrices that stand alone, vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from lightning_peft.network.block_lists import entry_names, find_lists, is_trunk
from lightning_peft.network.layers import heads, own_parameters
from lightning_peft.network.seeds import name_hash

VECTORS, ALONE = "vectors", "matrices"


@dataclass(frozen=True)
class Category:
    """Layers of one block that half of is drawn from.

    Attributes:
        name: Qualified name of the block and what the category is called.
        place: Place of the block among all.
        layers: Names of the layers.
        more: Whether more than half are frozen where they are odd in number.
    """

    name: str
    place: int
    layers: tuple[str, ...]
    more: bool = False

    def draw(self, seed: int, turn: int) -> list[str]:
        """Draw the half that is frozen in a round.

        Example:
            >>> category = Category("blocks.0/attn", 0, ("q", "k", "v", "o"))
            >>> category.draw(0, 0), len(Category("blocks.1/mlp", 1, ("up", "down", "gate"), more=True).draw(0, 0))
            (['v', 'o'], 2)
        """
        count = (len(self.layers) + self.more) // 2
        generator = torch.Generator().manual_seed(name_hash(f"{seed}/{turn}/{self.name}"))
        drawn = torch.randperm(len(self.layers), generator=generator)[:count].tolist()
        return [self.layers[index] for index in sorted(drawn)]


def categories_of(module: nn.Module, spared: Collection[nn.Module] = ()) -> list[Category]:
    """Sort the layers of a network that hold parameters of their own.

    Layers of one child of a block are a category if there are two matrices in it (the projections of an attention); matrices
    alone in their child are one together; layers that hold vectors alone, norms above all, are another. Of the categories of
    one kind with an odd number of layers, every second one has more than half of them frozen. A network without a list of
    blocks is one block, but for its head.

    Args:
        module: The network, or a module that holds it.
        spared: Layers that belong to none.

    Example:
        >>> block = lambda: nn.ModuleDict({"mix": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "norm": nn.LayerNorm(2)})
        >>> [(each.name, each.layers) for each in categories_of(nn.Sequential(block(), block()))][:2]
        [('0/mix', ('0.mix.0', '0.mix.1')), ('0/vectors', ('0.norm',))]
    """
    lists = find_lists(module, is_trunk)
    names = [name for path, blocks in lists.items() for name in entry_names(module, path, blocks.blocks)]
    if not names:
        spared = {*spared, *heads(list(module.modules()))}
    odd: Counter[str] = Counter()
    found = []
    for place, block in enumerate(names or [""]):
        for kind, layers in _of_block(module, block, spared).items():
            found.append(Category(f"{block}/{kind}", place, tuple(layers), more=odd[kind] % 2 == 1))
            odd[kind] += len(layers) % 2
    return found


def _of_block(module: nn.Module, block: str, spared: Collection[nn.Module]) -> dict[str, list[str]]:
    layers = {
        path: layer
        for path, layer in module.get_submodule(block).named_modules(prefix=block)
        if own_parameters(layer) and layer not in spared
    }
    kinds = {path: _child(path, block) if _has_matrix(layer) else VECTORS for path, layer in layers.items()}
    sizes = Counter(kinds.values())
    found: dict[str, list[str]] = {}
    for path, kind in kinds.items():
        found.setdefault(kind if kind == VECTORS or sizes[kind] > 1 else ALONE, []).append(path)
    return found


def _has_matrix(layer: nn.Module) -> bool:
    return any(tensor.ndim > 1 for tensor in own_parameters(layer).values())


def _child(path: str, block: str) -> str:
    return path.removeprefix(block).lstrip(".").partition(".")[0]

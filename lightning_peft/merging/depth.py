"""Where the tensors of a state dict stand in the depth of their network, read off their names and shapes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")


def depths(shapes: Mapping[str, torch.Size]) -> dict[str, float]:
    """Return for each tensor in a block from 0 for the first block to 1 for the last.

    Blocks are what stands in one list under numbers and holds tensors of like names and shapes; where several lists follow
    each other, as the stages of a residual network do, their entries are counted on.

    Args:
        shapes: Shapes by name, in the order of the network.

    Returns:
        Depths by name; what is in no block is not in it.

    Example:
        >>> two, four = torch.Size([2]), torch.Size([4])
        >>> depths({"stem.weight": four, "layers.0.weight": two, "layers.1.weight": two, "head.weight": four})
        {'layers.0.weight': 0.0, 'layers.1.weight': 1.0}
    """
    blocks: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        for match in _NUMBER.finditer(name):
            blocks.setdefault(name[: match.end()], {})[name[match.end() :]] = shape
    lists: dict[str, list[str]] = {}
    for block in blocks:
        lists.setdefault(block.rpartition(".")[0], []).append(block)
    found = [block for entries in lists.values() for block in entries if _alike(entries, blocks)]
    outer = [block for block in found if not any(block.startswith(f"{other}.") for other in found)]
    order = {block: place / max(1, len(outer) - 1) for place, block in enumerate(outer)}
    return {
        name: order[name[: match.end()]] for name in shapes for match in _NUMBER.finditer(name) if name[: match.end()] in order
    }


def _alike(entries: list[str], blocks: Mapping[str, Mapping[str, torch.Size]]) -> bool:
    """Whether neighbours in a list are of one kind: half of their tensors at least have one name and shape.

    The first block of a stage often has a projection that the others lack.
    """
    pairs = [set(blocks[entry].items()) for entry in entries]
    return any(2 * len(one & two) >= len(one | two) for one, two in itertools.pairwise(pairs))

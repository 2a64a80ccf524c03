"""Lists of blocks that make a network deep, found by their classes and shapes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_peft.network.plain_class import plain_class
from lightning_peft.network.plain_tensors import plain_tensors


@dataclass(frozen=True)
class Numbering:
    """How the entries of a list are called: a prefix, none in most lists, and a number that counts.

    Attributes:
        prefix: What all names begin with.
        first: Number of the first entry.
    """

    prefix: str = ""
    first: int = 0

    @classmethod
    def of(cls, names: Iterable[str]) -> Numbering | None:
        """Read it off the names of all entries; ``None`` where they do not count.

        Example:
            >>> Numbering.of(["0", "1"]), Numbering.of(["block_1", "block_2"]), Numbering.of(["conv", "norm"])
            (Numbering(prefix='', first=0), Numbering(prefix='block_', first=1), None)
        """
        names = list(names)
        match = re.fullmatch(r"(.*?)(0|[1-9]\d*)", names[0]) if names else None
        found = cls() if match is None else cls(match[1], int(match[2]))
        return found if [found.name(place) for place in range(len(names))] == names else None

    def name(self, place: int) -> str:
        """Name of the entry at a position."""
        return f"{self.prefix}{self.first + place}"

    def place(self, name: str) -> int:
        """Position of the entry with a name."""
        return int(name.removeprefix(self.prefix)) - self.first


@dataclass(frozen=True)
class BlockList:
    """An ``nn.ModuleList`` or ``nn.Sequential``.

    Attributes:
        entries: What it holds, in order.
        names: What they are called.
    """

    entries: tuple[nn.Module, ...]
    names: tuple[str, ...]

    @property
    def numbered(self) -> bool:
        """Whether it is known what a further entry is called."""
        return Numbering.of(self.names) is not None

    @property
    def kinds(self) -> list[str]:
        """Signature of each entry."""
        return [signature(entry) for entry in self.entries]

    @property
    def blocks(self) -> list[int]:
        """Positions of the entries made of layers that stand in the list once; a stem or an activation is none."""
        kin = ties(self.entries)
        return [place for place, entry in enumerate(self.entries) if kin.count(kin[place]) == 1 and _has_layers(entry)]


Rule = Callable[[BlockList], bool]


def find_lists(network: nn.Module, rule: Rule, name: str = "") -> dict[str, BlockList]:
    """Find the lists that a rule takes, outermost only.

    Args:
        network: The network.
        rule: Which lists: :func:`is_equal`, :func:`is_trunk`.
        name: Qualified name of the network, with which those of the lists begin.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> network = nn.ModuleDict({"stem": nn.Linear(2, 2), "layers": nn.ModuleList([block(), block()])})
        >>> list(find_lists(network, is_trunk, "model"))
        ['model.layers']
    """
    found: dict[str, BlockList] = {}
    for path, module in network.named_modules(prefix=name):
        blocks = as_list(module)
        if blocks is not None and not any(path.startswith(f"{outer}." if outer else "") for outer in found) and rule(blocks):
            found[path] = blocks
    return found


def as_list(module: nn.Module) -> BlockList | None:
    """Read a module as a list of blocks; ``None`` for one of another kind, and for a list that leaves places empty."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or None in module._modules.values():
        return None
    return BlockList(tuple(module), tuple(module._modules))


def entry_names(module: nn.Module, path: str, places: Iterable[int]) -> list[str]:
    """Qualified names of entries of a list.

    Example:
        >>> entry_names(nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), nn.ReLU())}), "body", [1])
        ['body.1']
    """
    names = list(module.get_submodule(path)._modules)
    return [f"{path}.{names[place]}".removeprefix(".") for place in places]


def is_equal(blocks: BlockList) -> bool:
    """At least two entries, with parameters, all of one class and shapes: a copy of any can stand anywhere in the list.

    Example:
        >>> is_equal(as_list(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
        True
    """
    first = blocks.entries[:1]
    return len(blocks.entries) > 1 and any(True for entry in first for _ in entry.parameters()) and len({*blocks.kinds}) == 1


def is_trunk(blocks: BlockList) -> bool:
    """Numbered, with two blocks of one class and shapes, or of one class only and no such list inside.

    So a stage of a ResNet is one, whose first block changes the shape, and the stages of a Swin transformer are not one, but
    the blocks in each of them are. That one block's output is the next one's input shows in the forward pass only.
    """
    places = blocks.blocks
    if not blocks.numbered or len(places) < 2:
        return False
    entries = [blocks.entries[place] for place in places]
    kinds = [signature(entry) for entry in entries]
    classes = {kind.partition(":")[0] for kind in kinds}
    if len(set(kinds)) < len(kinds):
        return True
    return len(classes) < len(kinds) and not any(find_lists(entry, is_trunk) for entry in entries)


def signature(block: nn.Module) -> str:
    """Name the class of a block and its tensors with their shapes, in a few characters; weight maps do not count.

    Example:
        >>> signature(nn.Linear(2, 3)) == signature(nn.Linear(2, 3)) != signature(nn.Linear(2, 4))
        True
    """
    shapes = ",".join(f"{name}{tuple(tensor.shape)}" for name, tensor in sorted(plain_tensors(block).items()))
    return f"{plain_class(block).__name__}:{zlib.crc32(shapes.encode()):08x}"


def ties(blocks: Sequence[nn.Module] | nn.ModuleList | nn.Sequential) -> list[int]:
    """Return, for every position, the first one that holds the same block.

    Example:
        >>> block = nn.Linear(2, 2)
        >>> ties(nn.Sequential(nn.Linear(2, 2), block, block))
        [0, 1, 1]
    """
    first: dict[int, int] = {}
    return [first.setdefault(id(block), place) for place, block in enumerate(blocks)]


def _has_layers(entry: nn.Module) -> bool:
    return any(True for _ in entry.children()) and any(True for _ in entry.parameters())

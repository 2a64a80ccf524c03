"""Finding the list of equal blocks that makes a network deep, and the layers in a block that write its result."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.depth import signature

_WRITERS = ("proj", "out_proj", "o_proj", "c_proj", "down_proj", "fc2", "w2", "wo", "w3", "linear2", "dense")
_CLEAR = 4  # a list this many times as large as the next is what "the blocks" means


def block_lists(module: nn.Module) -> dict[str, nn.Module]:
    """Return every list of at least two equal blocks with parameters, outermost only, the largest first."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not isinstance(child, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = list(child)
        if len(blocks) > 1 and len({signature(block) for block in blocks}) == 1 and any(True for _ in blocks[0].parameters()):
            found[name] = child
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
            f"blocks={name!r} is no list of blocks of {type(module).__name__}. Lists of equal blocks: {shown or 'none'}."
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


def residual_writers(block: nn.Module, named: Sequence[str] = ()) -> list[str]:
    """Name the tensors of the layers whose output is added to the residual stream.

    With all of them zero a pre-norm block passes its input on. A block that ends each branch in BatchNorm has its last norm in
    their place (``bn3``, or ``bn2`` without one), as in the LEMON and zero-init-residual literature.

    Args:
        block: The block.
        named: Names of these layers in the block; by default they are recognised by the names timm and transformers use.

    Raises:
        MisconfigurationException: None was found.
    """
    layers = dict(block.named_modules())
    if missing := [name for name in named if name not in layers]:
        raise MisconfigurationException(
            f"outputs={missing} are no layers of {type(block).__name__}, which has {list(layers)[1:]}."
        )
    norms = [name for name in ("bn3", "bn2") if name in layers][:1]
    weighted = (nn.Linear, nn.modules.conv._ConvNd)
    found = list(named) or [
        name
        for name, layer in layers.items()
        if name.rpartition(".")[2] in _WRITERS and (isinstance(layer, weighted) or type(layer).__name__ == "Conv1D")
    ]
    found = list(named) or norms or found
    if not found:
        raise MisconfigurationException(
            f"No layer of {type(block).__name__} was recognised as writing into the residual stream. Name them with "
            f"outputs=[...]; it has {[name for name, layer in layers.items() if not list(layer.children())]}."
        )
    return [
        f"{name}.{tensor}" for name in found for tensor in ("weight", "bias") if getattr(layers[name], tensor, None) is not None
    ]

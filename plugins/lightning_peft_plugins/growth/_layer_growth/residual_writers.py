"""The layers in a block that write its result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.network.block_lists import signature
from lightning_peft.network.layers import own_parameters

_WRITERS = ("proj", "out_proj", "o_proj", "c_proj", "down_proj", "fc2", "w2", "wo", "w3", "linear2", "dense")


def writers_of_all(blocks: Iterable[nn.Module], named: Sequence[str] = ()) -> list[str]:
    """Name what :func:`residual_writers` names in any of some blocks, which may be of several kinds.

    Raises:
        MisconfigurationException: None was found in one of them, or no block has a layer that is named.
    """
    kinds = {signature(block): block for block in blocks}
    own = {kind: {name for name, _ in block.named_modules()} for kind, block in kinds.items()}
    lost = [name for name in named if not any(name in names for names in own.values())]
    found: dict[str, None] = {}
    for kind, block in kinds.items():
        mine = [name for name in named if name in own[kind]]
        if mine or lost or not named:
            found |= dict.fromkeys(residual_writers(block, lost or mine))
    return list(found)


def residual_writers(block: nn.Module, named: Sequence[str] = ()) -> list[str]:
    """Name the tensors of the layers whose output is added to the residual stream.

    With all of them zero a pre-norm block passes its input on. A block that ends each branch in BatchNorm has its last norm in
    their place (``bn3``, or ``bn2`` without one), as in the LEMON and zero-init-residual literature. Whether they were
    recognised rightly is measured in the first step (:mod:`~lightning_peft_plugins.growth._layer_growth.promise`).

    Args:
        block: The block.
        named: Names of these layers in the block; by default they are recognised by the names timm and transformers use, and
            as the last layers of branches in which none has such a name.

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
    found = list(named) or norms or found + _ends_of_branches(block, found)
    if not found:
        raise MisconfigurationException(
            f"No layer of {type(block).__name__} was recognised as writing into the residual stream. Name them with "
            f"outputs=[...]; it has {[name for name, layer in layers.items() if not list(layer.children())]}."
        )
    return [
        f"{name}.{tensor}" for name in found for tensor in ("weight", "bias") if getattr(layers[name], tensor, None) is not None
    ]


def _ends_of_branches(block: nn.Module, found: Sequence[str]) -> list[str]:
    """The last layer with parameters of every container in a block that holds none of those found."""
    ends = []
    for name, branch in block.named_children():
        layers = [key for key, layer in branch.named_modules() if key and own_parameters(layer)]
        if layers and not any(writer.startswith(f"{name}.") for writer in found):
            ends.append(f"{name}.{layers[-1]}")
    return ends

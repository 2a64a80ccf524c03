"""Splitting layers of low rank into two smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.arguments import one_of
from lightning_peft.attaching.lasting import leave_hooks
from lightning_peft.namespaces import both
from lightning_peft.network.targets import TargetSpec, select
from lightning_peft.structure import journal
from lightning_peft.structure.low_rank_pair import LowRankPair, can_be_split, fill_pair, plain_weight
from lightning_peft.structure.put import put_edit, shells
from lightning_peft.weights.low_rank import SCHEMES, Scheme, as_matrix, decompose
from lightning_peft.weights.mapped_layer import is_mapped


class _Factors(NamedTuple):
    """``left @ right`` is the matrix of a weight of this shape."""

    left: Tensor
    right: Tensor
    shape: torch.Size


def split_low_rank(
    module: nn.Module,
    targets: TargetSpec = "all-weights",
    exclude: TargetSpec | None = None,
    scheme: Scheme = "channel",
    *,
    tolerance: float = 1e-4,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Replace layers, in place, by a ``Sequential`` of two that compute the same, where that takes fewer operations.

    It is an ordinary module afterwards, with other names: ``fc.weight`` becomes ``fc.0.weight`` and ``fc.1.weight``. The
    splits are written into the journal of the module, as changes in training are: give the LightningModule, and its
    checkpoints, ``save_baked`` and ``load_from_checkpoint`` know them. To load a bare state dict, give a new instance the same
    structure with ``ranks=``. Optimizers have to be made anew.

    Args:
        module: A module without weight maps: after the fit, or baked.
        targets: Layers to look at: Linear, Conv1d/2d/3d and HF ``Conv1D``. Grouped convolutions are left whole, and subclasses,
            whose weight other code may read.
        exclude: Layers to leave whole.
        scheme: ``"channel"`` or ``"spatial"``, see :func:`lightning_peft.weights.low_rank.as_matrix`.
        tolerance: Singular values up to this share of the largest are dropped.
        ranks: Names of the layers to split, each with its rank, in place of looking at their weights.

    Returns:
        Rank of every layer that was split, by name.

    Raises:
        MisconfigurationException: An unknown scheme, a rank that does not fit, a weight under maps, or one without a
            decomposition; nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
        >>> _ = nn.init.ones_(net[0].weight)
        >>> split_low_rank(net)
        {'0': 1}
        >>> [tuple(p.shape) for p in net.parameters()]
        [(1, 8), (8, 1)]
    """
    one_of("scheme", scheme, SCHEMES)
    layers = select(module, targets, exclude) if ranks is None else {name: _layer(module, name) for name in ranks}
    made: dict[str, _Factors] = {}
    for name, layer in layers.items():
        if is_mapped(layer) or parametrize.is_parametrized(layer):
            raise MisconfigurationException(
                f"{name} is under weight maps. Bake the module first: lightning_peft.bake(copy.deepcopy(module))."
            )
        if not name or not can_be_split(layer):
            continue
        factors = _factorise(name, layer, scheme, tolerance, None if ranks is None else ranks[name])
        if factors is not None:
            made[name] = factors
    for name, factors in made.items():
        change = journal.edit(module, put_edit(module, name, LowRankPair(len(factors.right), scheme)))
        change.removed.update(shells(change.removed))  # the split is to save memory
        fill_pair(module.get_submodule(name), factors.shape, scheme, factors.left, factors.right)
    if isinstance(module, both(LightningModule)):
        leave_hooks(module)
    return {name: len(factors.right) for name, factors in made.items()}


def _layer(module: nn.Module, name: str) -> nn.Module:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise MisconfigurationException(f"ranks= names {name!r}, which {type(module).__name__} does not have.") from None
    if not (can_be_split(layer) or is_mapped(layer) or parametrize.is_parametrized(layer)):
        raise MisconfigurationException(f"ranks= names {name!r}, a {type(layer).__name__}, which cannot be split.")
    return layer


def _factorise(name: str, layer: Any, scheme: Scheme, tolerance: float, rank: int | None) -> _Factors | None:
    """The factors of a layer's weight, or nothing if one layer is cheaper."""
    weight = plain_weight(layer)
    matrix = as_matrix(weight, scheme)
    parts = decompose(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    if parts is None:
        raise MisconfigurationException(f"The weight of {name} has no singular value decomposition: it is not finite.")
    u, sigma, v = parts
    if rank is None:
        rank = max(1, int((sigma > tolerance * sigma[0]).sum()))
        if rank * _cost(layer, weight, scheme) >= weight.numel():
            return None
    elif not 1 <= rank <= len(sigma):
        raise MisconfigurationException(f"ranks= gives {name} {rank}; its weight has {len(sigma)} singular values.")
    root = sigma[:rank].sqrt()
    left, right = (u[:, :rank] * root).to(weight.dtype), (root.unsqueeze(1) * v[:rank]).to(weight.dtype)
    return _Factors(left, right, weight.shape)


def _cost(layer: Any, weight: Tensor, scheme: Scheme) -> int:
    """Multiplications of both factors per output position and rank; one layer takes the weight's number of entries."""
    if scheme == "spatial" and weight.ndim == 4:
        outputs, inputs, height, width = weight.shape
        return inputs * height * int(layer.stride[1]) + outputs * width
    return weight.shape[1:].numel() + weight.shape[0]

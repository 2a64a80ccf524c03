"""Folding batch norms into the convolutions before them, as every deployed network has them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_peft.network.channel_units import ChannelUnit
from lightning_peft.network.layers import is_conv


def set_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another."""
    path, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(path), attribute, layer)


@torch.no_grad()
def fold_norms(network: nn.Module, units: Sequence[ChannelUnit]) -> None:
    """Fold every batch norm that directly follows a layer of a unit into that layer, in place.

    What else the norm does (timm's carry an activation) stays where it was.

    Args:
        network: A network in evaluation mode.
        units: All units of the network, those without an activation too.
    """
    for unit in units:
        last = unit.producer
        for name in unit.chain:
            layer = network.get_submodule(name)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                if last and layer.running_mean is not None:
                    set_layer(network, last, _fused(network.get_submodule(last), layer))
                    set_layer(network, name, _rest(layer))
                last = ""
            elif not isinstance(layer, nn.Identity):
                last = name if is_conv(layer) else ""


def _fused(layer: Any, norm: Any) -> nn.Module:
    norm = copy.copy(norm)
    norm._parameters = dict(norm._parameters)
    if norm.weight is None:
        norm.weight, norm.bias = (
            nn.Parameter(torch.ones_like(norm.running_mean)),
            nn.Parameter(torch.zeros_like(norm.running_mean)),
        )
    fused: nn.Module = (fuse_conv_bn_eval if is_conv(layer) else fuse_linear_bn_eval)(layer, norm)
    return fused


def _rest(norm: nn.Module) -> nn.Module:
    parts = [getattr(norm, name, None) for name in ("drop", "act")]
    kept = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
    return nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)

"""Proving that a network that skips computes what the one that masks does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.network.channel_units import ChannelUnit
from lightning_peft.network.layers import is_conv
from lightning_peft.network.logits import as_logits
from lightning_peft_plugins.pruning._ftwt.skipping.build import build
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor
from lightning_peft_plugins.pruning._ftwt.skipping.shell import why_whole

_TOLERANCE = 1e-3
_SAMPLES = 4


def masked_outputs(
    dense: nn.Module, units: Sequence[ChannelUnit], predictors: Mapping[str, ChannelPredictor], tokens: bool, inputs: Tensor
) -> list[Tensor]:
    """What a network gives for some inputs, one at a time, when every unit is computed whole and masked."""
    network = build(dense, units, predictors, [unit.producer for unit in units], tokens)
    return [_output(network, sample) for sample in inputs[:_SAMPLES].split(1)]  # type: ignore[no-untyped-call]


def masked_units(
    dense: nn.Module,
    units: Sequence[ChannelUnit],
    predictors: Mapping[str, ChannelPredictor],
    tokens: bool,
    inputs: Tensor,
    reference: Sequence[Tensor],
) -> dict[str, str]:
    """Find the units that must be computed whole, by trying.

    Args:
        dense: The network, norms folded.
        units: The gated units.
        predictors: Predictor by the unit's producer.
        tokens: Whether each token of a linear unit is judged on its own.
        inputs: Real inputs; as many are tried as there are references.
        reference: What the network gives for each input alone when all units are masked.

    Returns:
        Producer of each such unit, and why.
    """
    masked = {unit.producer: reason for unit in units if (reason := _why_masked(dense, unit))}
    if not _difference(dense, units, predictors, masked, tokens, inputs, reference):
        return masked
    names = [unit.producer for unit in units if unit.producer not in masked]
    for name in names:
        others = {other: "" for other in names if other != name} | masked
        if problem := _difference(dense, units, predictors, others, tokens, inputs, reference):
            masked[name] = problem
    return masked


def _why_masked(dense: nn.Module, unit: ChannelUnit) -> str:
    """Why a unit's layers cannot compute a part of its channels; empty when they can."""
    chain = {name: dense.get_submodule(name) for name in unit.chain}
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in chain.values()):
        return "a norm on its way could not be folded"
    reduced = {name: dense.get_submodule(name) for name in (unit.producer, *unit.consumers)}
    reduced |= {name: layer for name, layer in chain.items() if is_conv(layer)}
    return next((f"{name}: {reason}" for name, layer in reduced.items() if (reason := why_whole(layer))), "")


def _difference(
    dense: nn.Module,
    units: Sequence[ChannelUnit],
    predictors: Mapping[str, ChannelPredictor],
    masked: Collection[str],
    tokens: bool,
    inputs: Tensor,
    reference: Sequence[Tensor],
) -> str:
    """How a network that skips differs from the one that masks; empty when it does not."""
    network = build(dense, units, predictors, masked, tokens)
    try:
        for i, expected in enumerate(reference):
            found = _output(network, inputs[i : i + 1])
            if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
                return f"outputs differ by {float((found - expected).abs().max()):.2g}"
    except Exception as error:  # a stranger's forward on fewer channels than it expects
        return f"its forward needs all channels ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    return ""


def _output(network: nn.Module, inputs: Tensor) -> Tensor:
    return as_logits(network(inputs))

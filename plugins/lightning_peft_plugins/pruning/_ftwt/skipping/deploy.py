"""Building a network that skips, proving it against the one that masks, and calibrating it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.network.channel_units import ChannelUnit, channel_units
from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.network.layers import is_linear, own_parameters
from lightning_peft.weights.detach import detach_maps
from lightning_peft_plugins.pruning._ftwt.skipping.build import build, lay_out, producer_of
from lightning_peft_plugins.pruning._ftwt.skipping.calibrate import calibrate_layers
from lightning_peft_plugins.pruning._ftwt.skipping.clock import Paired, paired_times
from lightning_peft_plugins.pruning._ftwt.skipping.fold import fold_norms, set_layer
from lightning_peft_plugins.pruning._ftwt.skipping.layers import SelectiveLayer
from lightning_peft_plugins.pruning._ftwt.skipping.native import missing
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor
from lightning_peft_plugins.pruning._ftwt.skipping.prove import masked_outputs, masked_units
from lightning_peft_plugins.pruning._ftwt.skipping.selection import Selection
from lightning_peft_plugins.pruning._ftwt.skipping.steady import choices_of, steadiness, usual

_CALIBRATION = 16  # samples to measure on
_STEADY = 0.95  # share of a unit's choices that are as for most inputs, from which it need not be asked any more


@dataclass
class Deployed:
    """A network that computes what each input needs, and what that is worth.

    Attributes:
        network: The network: an ordinary module whose layers keep their names; it needs neither a Trainer nor the method. Its
            parameters are frozen.
        dense: The same network with every channel computed and none masked, norms folded, in the faster memory layout.
        flops: Operations for one sample that the network really executes, averaged over the calibration inputs, as a share
            of the dense network's.
        times: Seconds for one sample, dense and skipping, measured in turns.
        masked: Units that are computed whole and masked, with the reason.
        dropped: Units whose predictor cost more time than it saved, so that they compute what any of the inputs chose.
        fixed: Units that compute the same channels for every input, because they nearly always chose the same.
        ways: How each layer computes.
        kernels: Why there are no compiled kernels for layers to use on the CPU; empty when there are.
    """

    network: nn.Module
    dense: nn.Module
    flops: float
    times: Paired
    masked: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    ways: dict[str, str] = field(default_factory=dict)
    kernels: str = ""

    @property
    def speedup(self) -> float:
        """Median time of the dense network over that of this one, for one sample."""
        return self.times.ratio

    def __str__(self) -> str:
        achieved, possible = self.speedup, 1.0 / self.flops
        return (
            f"{self.flops:.1%} of the dense operations: {possible:.2f}x if time followed them, {achieved:.2f}x measured "
            f"({self.times.low:.2f} to {self.times.high:.2f}), {self.times.first * 1e3:.2f} ms dense, "
            f"{self.times.second * 1e3:.2f} ms skipping, {len(self.masked)} units masked only, {len(self.fixed)} fixed, "
            f"{len(self.dropped)} dropped{f'; no compiled kernels: {self.kernels}' if self.kernels else ''}"
        )


@torch.no_grad()
def deploy(
    network: nn.Module,
    units: Sequence[ChannelUnit],
    predictors: Mapping[str, ChannelPredictor],
    inputs: Tensor,
    *,
    tokens: bool = False,
    calibrate: bool = True,
    exact: bool = True,
) -> Deployed:
    """Turn a trained network and its predictors into one that computes only the channels chosen.

    The result is proved on the inputs: it must give what the masked network gives. Units for which it does not, or whose
    ``forward`` cannot work on a part of the channels, are computed whole and masked.

    Args:
        network: The trained network; it stays as it is.
        units: The gated units.
        predictors: Trained predictor by the unit's producer.
        inputs: Real inputs, shape ``(samples, ...)``; the more there are, the better what is not exact is chosen.
        tokens: Whether each token of a linear unit is judged on its own.
        calibrate: Measure which way of computing is fastest for each layer.
        exact: Compute what the masked network computes. Otherwise units that nearly always choose the same channels compute
            those only, and units whose predictor costs more time than it saves compute the channels that any of the inputs
            chose, both without a predictor; outputs differ a little: check the accuracy.

    Raises:
        MisconfigurationException: There are no inputs.
    """
    if not len(inputs):
        raise MisconfigurationException("deploy() needs at least one real input to prove and calibrate the network on.")
    device = next(network.parameters()).device
    inputs = inputs.to(device)
    dense = deep_copy(network).eval().to(memory_format=torch.contiguous_format)
    detach_maps(dense, "baked")
    _bake_parametrizations(dense)
    _untranspose(dense)
    fold_norms(dense, channel_units(dense))
    predictors = {name: copy.deepcopy(predictor).to(device).eval() for name, predictor in predictors.items()}
    reference = masked_outputs(dense, units, predictors, tokens, inputs)
    masked = masked_units(dense, units, predictors, tokens, inputs, reference)
    samples = inputs[:_CALIBRATION].split(1)  # type: ignore[no-untyped-call]
    choices = {} if exact else choices_of(dense, units, predictors, tokens, inputs.split(1))  # type: ignore[no-untyped-call]
    choices = {name: seen for name, seen in choices.items() if name not in masked}
    fixed = {name: usual(seen) for name, seen in choices.items() if steadiness(seen) >= _STEADY}
    steady, dropped = list(fixed), []
    skipping = build(dense, units, predictors, masked, tokens, fixed)
    if calibrate:
        skipping, gains = _calibrated(skipping, samples)
        if not exact:
            dynamic = {unit.producer: producer_of(skipping, unit).writes for unit in units if unit.producer not in fixed}
            dropped = [name for name, writes in dynamic.items() if writes and gains.get(writes, 1.0) <= 0.0 and name in choices]
            fixed |= {name: choices[name].any(0).nonzero().flatten() for name in dropped}
            units = [unit for unit in units if len(fixed.get(unit.producer, ())) < unit.channels]
            skipping, _ = _calibrated(build(dense, units, predictors, masked, tokens, fixed), samples)
    skipping.requires_grad_(False)  # the kernels know no gradients
    flops = _flops(skipping, samples) / max(_flops(dense, samples), 1)
    dense = in_fastest_layout(dense, samples[0])
    times = paired_times(dense, skipping, samples)
    ways = {name: str(layer.way) for name, layer in skipping.named_modules() if isinstance(layer, SelectiveLayer)}
    return Deployed(skipping, dense, flops, times, masked, dropped, steady, ways, missing())


def _calibrated(network: nn.Module, samples: Sequence[Tensor]) -> tuple[nn.Module, dict[Selection, float]]:
    """Give every layer its fastest way, in the memory layout in which all of them together are faster."""
    if samples[0].ndim != 4:
        return network, calibrate_layers(network, samples)
    other = lay_out(copy.deepcopy(network), channels_last=True)
    gains, other_gains = calibrate_layers(network, samples), calibrate_layers(other, samples)
    if paired_times(network, other, samples).ratio > 1.0:
        return other, other_gains
    return network, gains


def in_fastest_layout(dense: nn.Module, sample: Tensor) -> nn.Module:
    """A network in the faster memory layout for a sample: what another is compared with must not lose for its layout."""
    if sample.ndim != 4:
        return dense
    other = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    return other if paired_times(dense, other, [sample], runs=5).ratio > 1.0 else dense


def _bake_parametrizations(network: nn.Module) -> None:
    """Make tensors that are computed from others, as by a weight norm, ordinary ones: they do not change any more."""
    for layer in network.modules():
        if not parametrize.is_parametrized(layer):
            continue
        # Taking one off edits the class, which a copy of a network shares with its original.
        namespace = {key: value for key, value in vars(type(layer)).items() if key not in ("__dict__", "__weakref__")}
        layer.__class__ = type(type(layer).__name__, type(layer).__bases__, namespace)
        for name in list(layer.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)


def _untranspose(network: nn.Module) -> None:
    """Put torch's linear layers in the place of those whose weight is transposed (transformers' ``Conv1D``)."""
    for name, layer in list(network.named_modules()):
        if not is_linear(layer) or isinstance(layer, nn.Linear):
            continue
        own = own_parameters(layer)
        weight, bias = own["weight"], own.get("bias")
        linear = nn.Linear(*weight.shape, bias=bias is not None, device="meta").train(layer.training)
        linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        set_layer(network, name, linear)


def _flops(network: nn.Module, samples: Sequence[Tensor]) -> float:
    with FlopCount() as count:
        for sample in samples:
            network(sample)
    return float(count.total / len(samples))

"""FTWT: each layer predicts from its input which of its channels this input needs, and computes only those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run, Step
from lightning_peft.arguments import one_of, positive
from lightning_peft.compose.schedule import parse_point
from lightning_peft.contract import SHARDED
from lightning_peft.network.channel_units import ChannelUnit, channel_units
from lightning_peft.network.layers import is_conv
from lightning_peft.network.nm_layers import input_dim
from lightning_peft.network.resolve import resolve_network
from lightning_peft.network.targets import TargetSpec, by_layer, select
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.weights.parts import placed_parts
from lightning_peft_plugins.pruning._ftwt.channel_gate import ChannelGate, GateCut, Prediction
from lightning_peft_plugins.pruning._ftwt.skipping.costs import LayerCosts, by_sample, share_of_cost
from lightning_peft_plugins.pruning._ftwt.skipping.deploy import Deployed, deploy
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import NORMALISE, Normalise
from lightning_peft_plugins.pruning._ftwt.trained_predictors import trained_predictors
from lightning_peft_plugins.pruning.functional.active_channels import Criterion

Tokens = Literal["sample", "each"]


class FTWT(Method):
    """Trains a predictor beside every convolution that says, from the input, which of its channels are worth computing.

    Each unit of convolution, norm and activation gets one linear layer on its input's channel means. It learns to name the
    channels that make up ``mass`` of the unit's activity, as the unit itself shows when all are computed; channels it does not
    name are set to zero, and the network learns to do without. Units are found in the graph of the network: a depthwise
    convolution belongs to the unit whose channels it filters. :meth:`deploy` then gives a network that computes only the
    channels named.

    Args:
        mass: Share of a unit's activity to keep, in (0, 1]; with ``criterion="uniform"`` the share of its channels.
        masses: Other shares for some layers, ``{target: share}``; the last match counts.
        criterion: ``"mass"`` or ``"uniform"``, see ``active_channels``.
        decoupled: Whether predictors learn alone; otherwise their loss trains the layers below too (the paper's joint loss).
        strength: Weight of the predictors' loss.
        cooldown: From here on predictors stay as they are and the network adapts to them: steps, ``"50%"`` or ``"3ep"``;
            ``None`` trains them to the end.
        normalise: What a predictor does to channel means: ``"softmax"``, as the official code, or ``"standard"``.
        lr_scale: Learning rate of predictors, as a multiple of their layer's.
        residual: Also gate layers without an activation, whose output is added to a residual stream, as the official code does
            in ResNets.
        tokens: Also gate the hidden units of feed-forward layers, our extension: by ``"sample"``, from the mean over tokens
            (which lets a causal model see the future), or ``"each"`` token on its own. ``None`` leaves linear layers alone.
        targets: Layers whose output may be gated.
        exclude: Layers to leave alone.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Attributes:
        predicted: Share of a dense network's operations that the first batch would need; ``None`` before the first step.

    Raises:
        MisconfigurationException: An argument out of range, or a network in which no unit is found.

    Example:
        >>> FTWT(mass=0.85)
        FTWT(mass=0.85, criterion='mass', ...)
    """

    lane = Lane.LOSS
    strategies = SHARDED
    reads = frozenset({Resource.STRUCTURE})
    parts = (ChannelGate,)
    paper = "Elkerdawy et al., Fire Together Wire Together, CVPR 2022, https://arxiv.org/abs/2110.08232"

    def __init__(
        self,
        mass: float = 0.9,
        criterion: Criterion = "mass",
        decoupled: bool = True,
        strength: float = 1.0,
        cooldown: int | float | str | None = "50%",
        *,
        masses: Mapping[str, float] | None = None,
        normalise: Normalise = "softmax",
        lr_scale: float = 10.0,
        residual: bool = False,
        tokens: Tokens | None = None,
        targets: TargetSpec = "all-weights",
        exclude: TargetSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        self.masses = dict(masses or {})
        for share in (mass, *self.masses.values()):
            if isinstance(share, bool) or not 0.0 < share <= 1.0:
                raise MisconfigurationException(f"mass={share!r} must be the share of activity to keep, above 0 and at most 1.")
        one_of("criterion", criterion, get_args(Criterion))
        one_of("normalise", normalise, NORMALISE)
        one_of("tokens", tokens, (None, *get_args(Tokens)))
        positive("strength", strength)
        positive("lr_scale", lr_scale)
        self.mass, self.criterion, self.decoupled, self.strength = mass, criterion, decoupled, strength
        self.normalise, self.lr_scale, self.residual, self.tokens = normalise, lr_scale, residual, tokens
        self.cooldown = None if cooldown is None else parse_point(cooldown)
        self._frozen_from: int | None = None
        self._costs = LayerCosts()
        self._last: dict[str, Prediction] = {}
        self.predicted: float | None = None

    def units(self, module: nn.Module) -> dict[str, ChannelUnit]:
        """Return the units to gate, by the qualified name of the layer that computes their channels.

        Raises:
            MisconfigurationException: None is found.
        """
        prefix, network = resolve_network(module, self.network)
        prefix = f"{prefix}." if prefix else ""
        wanted = select(module, self.targets or "all-weights", self.exclude)
        found = {prefix + unit.producer: unit for unit in channel_units(network)}
        linear = self.tokens is not None
        chosen = {
            name: unit
            for name, unit in found.items()
            if name in wanted and (unit.activated or self.residual) and (linear or is_conv(wanted[name]))
        }
        if not chosen:
            raise MisconfigurationException(
                f"{type(network).__name__} has no convolution followed by a norm or an activation that targets= selects"
                f"{'' if linear else ' (linear layers are gated with tokens=)'}. A layer must be called once in a forward that "
                "torch.fx can trace, at least within its block, to be part of a unit."
            )
        return chosen

    def claims(self, module: nn.Module) -> list[str]:
        """Weights stay as they are, so nothing is claimed."""
        return []

    def attach(self, module: LightningModule) -> None:
        """Hang a gate on every unit; at first it lets everything through."""
        _, network = resolve_network(module, self.network)
        units = self.units(module)
        masses = by_layer(module, units, self.mass, self.masses, "masses")
        for name, unit in units.items():
            producer = network.get_submodule(unit.producer)
            weight: Tensor = producer.weight  # type: ignore[assignment]
            read = weight.shape[input_dim(producer)]
            settings: tuple[Any, ...] = (self.normalise, self.tokens == "each", masses[name], self.criterion)
            gate = ChannelGate(read, unit.channels, *settings, joint=not self.decoupled)
            gate.lr_scale = self.lr_scale
            if weight.dtype == torch.float64:
                gate.to(weight.dtype)
            placed = self.put_part(module, name, gate.to(weight.device))
            placed.place(producer, network.get_submodule(unit.gate), unit.activations)
            if unit.gate != unit.producer:
                self.put_part(module, f"{name.removesuffix(unit.producer)}{unit.gate}", GateCut(placed))

    def gates(self, module: nn.Module) -> Iterator[tuple[str, ChannelGate]]:
        """Yield the gates by the qualified name of the layer they stand beside."""
        for placed in placed_parts(module):
            if isinstance(placed.part, ChannelGate) and placed.part.owner == type(self).__name__:
                yield placed.path, placed.part

    def start(self, run: Run) -> None:
        """Place the cool-down, and watch what layers cost in the first step."""
        if self.cooldown is not None:
            self._frozen_from = run.place(self.cooldown, "cooldown=")
        trained = trained_by(*run.trainer.optimizers)
        for name, gate in self.gates(run.module):
            if gate.predictor.weight not in trained:
                raise MisconfigurationException(
                    f"No optimizer trains {name}, so none trains its predictor. Leave the layer out with exclude=[{name!r}], "
                    "or give its weight, frozen or not, to an optimizer."
                )
            gate.open = True
        self._costs.open(run.network)

    def batch_start(self, run: Run, batch: Any) -> None:
        """Forget what was predicted outside of training steps."""
        for _, gate in self.gates(run.module):
            gate.take()

    def loss(self, step: Step) -> Tensor:
        """Binary cross-entropy of every predictor, summed over channels, averaged over samples and units."""
        first = not self._last
        terms = []
        for name, gate in self.gates(step.run.module):
            calls = gate.take()
            if not calls:
                raise MisconfigurationException(
                    f"{name} was not called in this training step, so its predictor cannot learn. Leave it out with "
                    f"exclude=[{name!r}]."
                )
            if not step.repeated:
                self._last[name] = Prediction(calls[-1].logits.detach(), calls[-1].target)
            losses = [binary_cross_entropy_with_logits(*_floats(call), reduction="none").sum(-1) for call in calls]
            # An expert that no token was sent to has nothing to learn from; a mean of nothing would be NaN.
            terms.append(torch.stack([loss.mean() if loss.numel() else loss.sum() for loss in losses]).mean())
        if first:
            self._costs.close()
            self._announce(step.run)
        # Zero, not nothing: DistributedDataParallel waits for the gradient of every parameter.
        return torch.stack(terms).mean() * (0.0 if self._is_frozen(step.run.step) else self.strength)

    def _is_frozen(self, step: int) -> bool:
        return self._frozen_from is not None and step >= self._frozen_from

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Hold predictors still in the cool-down: without a gradient neither momentum nor decay moves them."""
        if self._is_frozen(run.step):
            for _, gate in self.gates(run.module):
                for parameter in gate.parameters():
                    parameter.grad = None

    def _shares(self, run: Run, field: Literal["logits", "target"]) -> dict[str, Tensor]:
        prefix = f"{run.network_name}." if run.network_name else ""
        share = {}
        for name, last in self._last.items():
            mask = last.target if field == "target" else last.logits > 0
            share[name.removeprefix(prefix)] = (
                mask.float().flatten(1, -2).mean((1, 2)) if mask.ndim > 2 else mask.float().mean(1)
            )
        return by_sample(share)

    def _share_of_cost(self, run: Run, field: Literal["logits", "target"]) -> float:
        units = list(self.units(run.module).values())
        return float(share_of_cost(self._costs.of, units, self._shares(run, field)).mean())

    def _announce(self, run: Run) -> None:
        self.predicted = left = self._share_of_cost(run, "target")
        shares = [gate.keep for _, gate in self.gates(run.module)]
        kept = " to ".join(f"{share:.0%}" for share in dict.fromkeys((min(shares), max(shares))))
        rank_zero_info(
            f"{self.name}: keeping {kept} by {self.criterion}, the first batch would need {left:.1%} of the "
            f"operations ({sum(self._costs.of.values()) / 1e6:,.1f} MFLOPs a sample), {1 - left:.1%} fewer, once predictors "
            "choose as the channels' activity says."
        )

    def awaited(self, run: Run) -> Iterator[str]:
        """The cool-down."""
        if self._frozen_from is not None and run.step < self._frozen_from:
            yield f"the cool-down from step {self._frozen_from} on"

    def describe(self, module: nn.Module) -> str:
        """Say how many units are gated, and how many of them can skip on both sides."""
        units = self.units(module).values()
        channels, closed = sum(unit.channels for unit in units), sum(bool(unit.consumers) for unit in units)
        return f"{channels:,} channels in {len(units)} units, {closed} of which save their readers' work too"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Mean share of channels chosen, of operations left, and of choices that agree with the channels' activity."""
        if not self._last:
            return {}
        shares = self._shares(run, "logits")
        agree = [((last.logits > 0) == last.target).float().mean() for last in self._last.values() if last.target.numel()]
        found = {
            "active": torch.stack([share.mean() for share in shares.values()]).mean(),
            "agreement": torch.stack(agree).mean(),
        }
        return found | ({"cost": self._share_of_cost(run, "logits")} if self._costs.of else {})

    def finish(self, run: Run) -> None:
        """Let go of the layers and of the last step."""
        self._costs.close()
        self._last.clear()

    def deploy(
        self,
        module: LightningModule,
        inputs: Tensor,
        *,
        checkpoint: str | Path | None = None,
        trusted: bool = False,
        calibrate: bool = True,
        exact: bool = True,
    ) -> Deployed:
        """Build a network that computes only the channels its predictors choose; the module stays as it is.

        Args:
            module: The trained module: during training, after ``fit``, or loaded from a checkpoint.
            inputs: Real inputs of the network, shape ``(samples, ...)``; a few dozen are enough.
            checkpoint: Where to read predictors from when the module was not trained in this process.
            trusted: Whether Python objects in that file may be rebuilt, which can run code; see ``load_from_checkpoint``.
            calibrate: Measure, layer by layer, whether gathering pays, and compute densely where it does not; every choice
                gives the same outputs.
            exact: Compute what the trained network computes. Otherwise units that nearly always choose the same channels
                compute those only, and units whose predictor costs more time than it saves compute the channels that any of
                the inputs chose, both without a predictor; outputs differ a little: check the accuracy.

        Returns:
            The network, and what it costs and takes against the dense one.

        Raises:
            MisconfigurationException: No trained predictors are at hand, or the network does not run on ``inputs`` alone.
        """
        prefix, network = resolve_network(module, self.network)
        prefix = f"{prefix}." if prefix else ""
        states = trained_predictors(module, checkpoint, trusted=trusted)
        units = self.units(module)
        if not states or set(units) - set(states):
            missing = sorted(set(units) - set(states))
            raise MisconfigurationException(
                f"There is no trained predictor of {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Call deploy() "
                "on the module that was trained, before its weights change again, or pass checkpoint=."
            )
        predictors = {name.removeprefix(prefix): states[name] for name in units}
        _check_call(network, inputs)
        settings = {"tokens": self.tokens == "each", "calibrate": calibrate, "exact": exact}
        return deploy(network, list(units.values()), predictors, inputs, **settings)


def _check_call(network: nn.Module, inputs: Tensor) -> None:
    """Refuse a network that does not run on one tensor, in its own words.

    Raises:
        MisconfigurationException: It fails on the first input.
    """
    tensor = next(network.parameters())
    was = network.training
    try:
        with torch.no_grad():
            network.eval()(inputs[:1].to(tensor.device))
    except Exception as error:
        raise MisconfigurationException(
            f"deploy() calls {type(network).__name__} with inputs alone, and with these it fails: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. Pass a tensor of what its first argument takes. A network "
            "that needs several arguments can be put into one that needs one: train a module whose forward makes the others, "
            'and name it with network="<name>".'
        ) from error
    finally:
        network.train(was)


def _floats(call: Prediction) -> tuple[Tensor, Tensor]:
    return call.logits, call.target.to(call.logits.dtype)

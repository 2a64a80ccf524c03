"""The gate of one unit of channels while it trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft import Lane, WeightMap
from lightning_peft.network.channel_units import Activation, rectifies
from lightning_peft.network.layers import is_conv
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor, Normalise, channel_means, chosen
from lightning_peft_plugins.pruning.functional.active_channels import Criterion, active_channels

_MOST_CALLS = 64  # a step that calls a layer more often than this does not want all of them remembered


class Prediction(NamedTuple):
    """Logits of one call and what they should have been, both ``(..., channels)``."""

    logits: Tensor
    target: Tensor


class GateHook:
    """One of a gate's methods as a hook: a deep copy of the network has its own gates in its own hooks, a pickle has none.

    Args:
        gate: The gate.
        method: Name of its method.
    """

    def __init__(self, gate: ChannelGate, method: str) -> None:
        self.gate, self._method = gate, method

    def __call__(self, *args: Any) -> Any:
        return getattr(self.gate, self._method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> GateHook:
        return GateHook(copy.deepcopy(self.gate, memo), self._method)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything and does nothing, wherever the file is loaded


class ChannelGate(WeightMap):
    """Looks at a unit's input and sets the output channels to zero that its predictor does not choose.

    It hangs on the weight of the unit's producer, which it leaves as it is, so that the predictor is placed, averaged, copied,
    saved and taken off like the parameters of any weight map.

    Args:
        inputs: Input channels of the unit.
        outputs: Channels of the unit.
        normalise: See :class:`~lightning_peft_plugins.pruning._ftwt.skipping.predictor.ChannelPredictor`.
        tokens: Whether each token of a linear unit is judged on its own.
        keep: See :func:`~lightning_peft_plugins.pruning.functional.active_channels.active_channels`.
        criterion: See there.
        joint: Whether the predictor's gradient reaches the layers below.
    """

    kind = "channel_gate"
    lane = Lane.MASK
    optimizer_overrides = {"weight_decay": 0.0}

    def __init__(
        self,
        inputs: int,
        outputs: int,
        normalise: Normalise = "softmax",
        tokens: bool = False,
        keep: float = 0.9,
        criterion: Criterion = "mass",
        joint: bool = False,
    ) -> None:
        super().__init__()
        self.predictor = ChannelPredictor(inputs, outputs, normalise)
        self.tokens, self.keep, self.criterion, self.joint = tokens, keep, criterion, joint
        self.calls: list[Prediction] = []
        self.open = False
        self._config = {"inputs": inputs, "outputs": outputs, "normalise": normalise, "tokens": tokens}
        self._places: list[nn.Module] = []
        self._activations: Sequence[Activation] = ()
        self._convolution = self._rectified = True
        self._logits: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def config(self) -> dict[str, Any]:
        return self._config

    def place(self, producer: nn.Module, gate: nn.Module, activations: Sequence[Activation]) -> None:
        """Hang the gate in a network: it reads the input of one layer and cuts the output of another; once only.

        Args:
            producer: Layer that computes the channels.
            gate: Layer behind which channels that are zero stay zero.
            activations: What follows ``gate`` before the channels are read.
        """
        if self._places:
            return
        self._places, self._activations, self._convolution = [producer, gate], activations, is_conv(producer)
        # timm's norms carry their activation.
        last = activations or [getattr(gate, "act", nn.Identity())]
        self._rectified = self._convolution and all(rectifies(activation) for activation in last)
        producer.register_forward_pre_hook(GateHook(self, "_look"))
        gate.register_forward_hook(GateHook(self, "_cut"))

    def detached(self) -> None:
        """Leave the layers as they were."""
        for layer in self._places:
            for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, GateHook) and hook.gate is self]:
                    del hooks[key]
        self._places = []
        self.take()

    def take(self) -> list[Prediction]:
        """Return what was predicted since the last time, and forget it."""
        calls, self.calls, self._logits = self.calls, [], None
        return calls

    def _look(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs: Tensor = args[0] if self.joint else args[0].detach()
        self._logits = self.predictor(channel_means(inputs, convolution=self._convolution, tokens=self.tokens))

    def _cut(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        logits, self._logits = self._logits, None
        if logits is None:
            return output
        # A forward pass that activation checkpointing repeats within the backward pass is no second call.
        if self.open and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1 and len(self.calls) < _MOST_CALLS:
            self.calls.append(Prediction(logits, self._target(output.detach())))
        mask = chosen(logits.detach()).to(output.dtype)
        if self._convolution:
            return output * mask.view(*mask.shape, *[1] * (output.ndim - 2))
        return output * (mask if mask.ndim == output.ndim else mask.view(len(mask), *[1] * (output.ndim - 2), -1))

    @torch.no_grad()
    def _target(self, output: Tensor) -> Tensor:
        if self._rectified:
            # One pass over the map instead of four: the largest of what is rectified is the largest, rectified.
            output = output.amax(tuple(range(2, output.ndim)), keepdim=True)
        for activation in self._activations:
            output = activation(output)
        if self._convolution:
            strength = output.flatten(2).abs().amax(2)
        else:
            strength = output.abs() if self.tokens or output.ndim == 2 else output.abs().flatten(1, -2).amax(1)
        return active_channels(strength.float(), self.keep, self.criterion)

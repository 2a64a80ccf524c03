"""The gate of one unit of channels while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft import Lane, LayerPart
from lightning_peft.network.channel_units import Activation, rectifies
from lightning_peft.network.layers import is_conv
from lightning_peft.weights.functions import in_backward
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor, Normalise, channel_means, chosen
from lightning_peft_plugins.pruning.functional.active_channels import Criterion, active_channels

_MOST_CALLS = 64  # a step that calls a layer more often than this does not want all of them remembered


class Prediction(NamedTuple):
    """Logits of one call and what they should have been, both ``(..., channels)``."""

    logits: Tensor
    target: Tensor


class ChannelGate(LayerPart):
    """Looks at a unit's input and sets the output channels to zero that its predictor does not choose.

    It stands beside the unit's producer; where channels are cut behind another layer, :class:`GateCut` stands beside that.

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
    training_only = True

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
        self._cuts = False
        self._activations: Sequence[Activation] = ()
        self._convolution = self._rectified = True
        self._logits: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": [], "_logits": None}  # a copy made within a step has no part in the step's graph

    def config(self) -> dict[str, Any]:
        return self._config

    def place(self, producer: nn.Module, gate: nn.Module, activations: Sequence[Activation]) -> None:
        """Tell the gate where its unit's channels go.

        Args:
            producer: Layer that computes the channels.
            gate: Layer behind which channels that are zero stay zero.
            activations: What follows ``gate`` before the channels are read.
        """
        self._cuts, self._activations, self._convolution = gate is producer, activations, is_conv(producer)
        # timm's norms carry their activation.
        last = activations or [getattr(gate, "act", nn.Identity())]
        self._rectified = self._convolution and all(rectifies(activation) for activation in last)

    def around(self, call: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._look(args[0])
        output = call(*args, **kwargs)
        return self.cut(output) if self._cuts else output

    def detached(self) -> None:
        self.take()

    def take(self) -> list[Prediction]:
        """Return what was predicted since the last time, and forget it."""
        calls, self.calls, self._logits = self.calls, [], None
        return calls

    def _look(self, inputs: Tensor) -> None:
        inputs = inputs if self.joint else inputs.detach()
        self._logits = self.predictor(channel_means(inputs, convolution=self._convolution, tokens=self.tokens))

    def cut(self, output: Tensor) -> Tensor:
        """Set the channels of an output to zero that the predictor did not choose in the call it belongs to."""
        logits, self._logits = self._logits, None
        if logits is None:
            return output
        # A forward pass that activation checkpointing repeats within the backward pass is no second call.
        if self.open and torch.is_grad_enabled() and not in_backward() and len(self.calls) < _MOST_CALLS:
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


class GateCut(LayerPart):
    """Where a gate's channels are cut, when that is behind another layer than the one that computes them.

    Args:
        gate: The gate.
    """

    kind = "channel_cut"
    lane = Lane.MASK
    training_only = True
    recorded = False

    def __init__(self, gate: ChannelGate) -> None:
        super().__init__()
        self._gate = (gate,)  # a tuple, so that it is no submodule: it stands beside its own layer

    def forward(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._gate[0].cut(output)

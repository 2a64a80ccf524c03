"""The predictor of a unit in a network that skips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft_plugins.pruning._ftwt.skipping.native import Part, by_input, is_by_input, kernels, usable
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor, channel_means
from lightning_peft_plugins.pruning._ftwt.skipping.selection import Selection, check_channels, memory_format, spread
from lightning_peft_plugins.pruning._ftwt.skipping.values import readable


class UnitPredictor(nn.Module):
    """A trained predictor that reads the input of its unit, whole or already reduced to the channels of the unit before.

    It says the same as the trained one, but reads how far each mean stands above a mean of zero (see :func:`above_zero`), so
    that channels that are not there say nothing and nothing need be known of their weights. For that, weights are brought to a
    mean of zero over their inputs, which neither normalisation can tell but for what a softmax adds to the bias.

    Args:
        predictor: The trained predictor.
        convolution: Whether the unit is convolutional.
        tokens: Whether each token is judged on its own.
        fixed: Positions of the only inputs that are ever there; ``None`` for all.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, predictor: ChannelPredictor, *, convolution: bool, tokens: bool, fixed: Tensor | None = None) -> None:
        super().__init__()
        self.convolution, self.tokens, self.normalise = convolution, tokens, predictor.normalise
        weight, bias = predictor.weight.detach().double(), predictor.bias.detach().double()
        self.inputs = weight.shape[1]
        mean = weight.mean(1)
        if self.normalise == "softmax":
            bias = bias + mean
        weight = weight - mean[:, None]
        weight = weight if fixed is None else weight.index_select(1, fixed)
        self.absent = self.inputs - weight.shape[1]
        self.register_buffer("weight", by_input(weight.float()))
        self.register_buffer("bias", bias.float())

    def choose(self, inputs: Tensor, reads: Selection | None, writes: Selection, *, dense: bool) -> None:
        """Choose a unit's channels from inputs whose channels are those of a selection, or all.

        Args:
            inputs: Of the unit.
            reads: Channels the inputs have; ``None`` for all.
            writes: Where to put the choice.
            dense: Every channel will be computed and masked all the same.
        """
        if dense or not self._native(inputs):
            writes.choose(self(inputs, reads), dense=dense)
            return
        compiled = kernels()
        assert compiled is not None
        part = Part(inputs.shape[1 if self.convolution else -1], 0) if reads is None else reads.now.part
        maps = inputs if self.convolution else inputs.reshape(1, 1, -1, inputs.shape[-1]).permute(0, 3, 1, 2)
        standard = self.normalise == "standard"
        writes.accept(*compiled.choose(maps, part, self.weight, self.bias, all_inputs=self.inputs, standard=standard))

    def _native(self, inputs: Tensor) -> bool:
        """Whether a kernel can choose for these inputs: one sample whose channels lie side by side."""
        return (
            not self.tokens
            and usable(inputs, self.weight, self.bias)
            and inputs.shape[0] == 1
            and (inputs.ndim == 4 if self.convolution else inputs.ndim >= 2)
            and is_by_input(self.weight)
            and inputs.is_contiguous(memory_format=memory_format(self.convolution))
        )

    def forward(self, inputs: Tensor, reads: Selection | None) -> Tensor:
        """Predict, in float32, from inputs whose channels are those of a selection, or all."""
        means = self._means(inputs)
        if reads is not None and reads.now.index is not None:
            means = spread(means, reads.now, -1)
        check_channels(means, -1, self.weight.shape[1])
        kind = means.device.type if torch.amp.is_autocast_available(means.device.type) else "cpu"  # "meta" has none
        with torch.autocast(kind, enabled=False):
            values = above_zero(means.float(), self.absent, standard=self.normalise == "standard")
            return nn.functional.linear(values, self.weight.float(), self.bias.float())

    def _means(self, inputs: Tensor) -> Tensor:
        quick = self.convolution and readable(inputs) and len(inputs) == 1
        if not quick or inputs.dtype not in (torch.float32, torch.float64) or not inputs.numel():
            return channel_means(inputs, convolution=self.convolution, tokens=self.tokens)
        # A product with a vector reads a map of one sample in about half the time of a mean.
        places = inputs.shape[2:].numel()
        share = inputs.new_full((places,), 1.0 / places)
        channels_first = inputs.is_contiguous()
        maps = inputs.view(-1, places) if channels_first else inputs.movedim(1, -1).reshape(places, -1).t()
        return torch.mv(maps, share)[None]


def above_zero(means: Tensor, absent: int, *, standard: bool) -> Tensor:
    """How far channel means stand above a mean of zero, once all are brought to one scale.

    Args:
        means: Of the channels that are there, shape ``(..., present)``.
        absent: Number of channels that are not there and have a mean of zero.
        standard: Whether the scale is that of unit variance, instead of a softmax.

    Example:
        >>> above_zero(torch.tensor([[1.0, 0.0, -1.0]]), 0, standard=False)  # softmax, less that of the zero
        tensor([[ 0.4205,  0.0000, -0.1547]])
        >>> above_zero(torch.tensor([[1.0, -1.0]]), 1, standard=False)
        tensor([[ 0.4205, -0.1547]])
    """
    whole = nn.functional.pad(means, (0, absent)) if absent else means
    if standard:
        variance = (whole - whole.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        return means * (variance + 1e-5).rsqrt()  # as a layer norm has it
    total = whole.logsumexp(-1, keepdim=True)
    return (means - total).exp() - (-total).clamp(max=0.0).exp()

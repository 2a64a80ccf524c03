"""Which channels of a unit the input at hand needs: written by the layer that computes them, read by all that follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_peft.skipping.native import Part, kernels, usable
from lightning_peft.skipping.predictor import ChannelPredictor, channel_means, chosen, normalised


class Selection:
    """The channels of one unit for one call.

    For one sample these are the channels its predictor chooses; for several, the channels any of them needs, and a mask that
    takes from each sample what the others need. Their number is rounded up with channels that stay zero, because kernels are
    prepared anew for each size.

    Args:
        channels: Channels of the unit.
        step: What the number is rounded up to a multiple of.
        fixed: Positions of channels to choose for every input; nobody predicts then.

    Attributes:
        index: Positions of the channels, the rounding included, shape ``(k,)``; ``None`` when all are computed.
        count: How many of them are chosen; the rest stays zero.
        mask: What each sample needs of all channels, shape ``(..., channels)``; ``None`` for a single sample.
        fixed: Whether the channels are the same for every input.
    """

    def __init__(self, channels: int, step: int, fixed: Tensor | None = None) -> None:
        self.channels, self.step = channels, step
        self.fixed = fixed is not None
        self.index = fixed
        self.count = channels if fixed is None else len(fixed)
        self.mask: Tensor | None = None

    def choose(self, logits: Tensor, *, dense: bool) -> None:
        """Choose channels for the samples at hand.

        Args:
            logits: What the predictor says, shape ``(..., channels)``.
            dense: Compute every channel all the same, and mask.
        """
        single = logits.shape[:-1].numel() == 1
        if single and not dense and logits.device.type == "cpu":
            self._choose_quickly(logits)
            return
        mask = chosen(logits)
        active = None if dense else (mask.flatten() if single else mask.flatten(0, -2).any(0)).nonzero().flatten()
        if active is None or (size := self._rounded(len(active))) == self.channels:
            self.index, self.count, self.mask = None, self.channels, mask
            return
        self.index, self.count = nn.functional.pad(active, (0, size - len(active))), len(active)
        self.mask = None if single else mask

    def _choose_quickly(self, logits: Tensor) -> None:
        """The same for one sample on the CPU, where a call of NumPy costs a tenth of one of PyTorch."""
        values = logits.detach().numpy().reshape(-1)
        active = np.flatnonzero(values > 0)
        self.accept(torch.from_numpy(active if len(active) else np.argmax(values, keepdims=True)), logits)

    def accept(self, active: Tensor, logits: Tensor) -> None:
        """Take over what was chosen for one sample.

        Args:
            active: Positions of the channels, ascending.
            logits: What the predictor said of all, shape ``(..., channels)``.
        """
        count = active.shape[0]
        size = self._rounded(count)
        if size == self.channels:
            self.index, self.count, self.mask = None, self.channels, None if count == size else chosen(logits)
            return
        self.index, self.count, self.mask = active, count, None
        if size > count:
            self.index = nn.functional.pad(active, (0, size - count))

    @property
    def part(self) -> Part:
        """The channels at hand, as the kernels want to know them."""
        return Part(self.count, self.channels if self.index is None else self.index.shape[0], self.index)

    def _rounded(self, count: int) -> int:
        return min(-(-count // self.step) * self.step, self.channels)


class UnitPredictor(nn.Module):
    """A trained predictor that reads the input of its unit, whole or already reduced to the channels of the unit before.

    Args:
        predictor: The trained predictor.
        convolution: Whether the unit is convolutional.
        tokens: Whether each token is judged on its own.
    """

    weight: Tensor
    bias: Tensor
    by_input: Tensor | None
    sums: Tensor | None

    def __init__(self, predictor: ChannelPredictor, *, convolution: bool, tokens: bool) -> None:
        super().__init__()
        self.convolution, self.tokens, self.normalise = convolution, tokens, predictor.normalise
        self.register_buffer("weight", predictor.weight.detach().float())
        self.register_buffer("bias", predictor.bias.detach().float())
        # For the kernels, which read the rows of the inputs that are there.
        native = kernels() is not None and not tokens
        self.register_buffer("by_input", self.weight.t().contiguous() if native else None, False)
        self.register_buffer("sums", self.weight.sum(1) if native else None, False)
        self.register_load_state_dict_post_hook(_follow_weight)  # type: ignore[no-untyped-call]

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
        assert self.by_input is not None
        assert self.sums is not None
        part = Part(inputs.shape[1 if self.convolution else -1], 0) if reads is None else reads.part
        maps = inputs if self.convolution else inputs.reshape(1, 1, -1, inputs.shape[-1]).permute(0, 3, 1, 2)
        standard = self.normalise == "standard"
        writes.accept(*compiled.choose(maps, part, self.by_input, self.sums, self.bias, standard=standard))

    def _native(self, inputs: Tensor) -> bool:
        """Whether a kernel can choose for these inputs: one sample whose channels lie side by side."""
        if self.by_input is None or inputs.shape[0] > 1 or not usable(inputs, self.weight):
            return False
        return inputs.is_contiguous(memory_format=memory_format(inputs.ndim == 4))

    def forward(self, inputs: Tensor, reads: Selection | None) -> Tensor:
        """Predict from inputs whose channels are those of a selection, or all."""
        means = self._means(inputs)
        if reads is not None and reads.index is not None:
            means = spread(means, reads, -1)
        return nn.functional.linear(normalised(means.float(), self.normalise), self.weight, self.bias)

    def _means(self, inputs: Tensor) -> Tensor:
        if not self.convolution or len(inputs) > 1 or inputs.dtype not in (torch.float32, torch.float64):
            return channel_means(inputs, convolution=self.convolution, tokens=self.tokens)
        # A product with a vector reads a map of one sample in about half the time of a mean.
        places = inputs.shape[2:].numel()
        share = inputs.new_full((places,), 1.0 / places)
        channels_first = inputs.is_contiguous()
        maps = inputs.view(-1, places) if channels_first else inputs.movedim(1, -1).reshape(places, -1).t()
        return torch.mv(maps, share)[None]


def _follow_weight(predictor: nn.Module, incompatible: Any) -> None:
    """Derive from a weight that was loaded what the kernels read."""
    assert isinstance(predictor, UnitPredictor)
    if predictor.by_input is not None:
        predictor.by_input, predictor.sums = predictor.weight.t().contiguous(), predictor.weight.sum(1)


def in_layout(value: Tensor, channels_last: bool) -> Tensor:
    """Feature maps in a memory layout, other tensors as they are."""
    return value.contiguous(memory_format=memory_format(channels_last)) if value.ndim == 4 else value


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's name of a layout, which cannot be pickled."""
    return torch.channels_last if channels_last else torch.contiguous_format


def spread(value: Tensor, selection: Selection, dim: int) -> Tensor:
    """Put selected channels back in their places, with zeros in between."""
    assert selection.index is not None
    shape = list(value.shape)
    shape[dim] = selection.channels
    whole = value.new_zeros(shape)
    return whole.index_copy_(dim, selection.index[: selection.count], value.narrow(dim, 0, selection.count))


class SelectionGate(nn.Module):
    """Ends the part of a unit in which channels must be set to zero; puts them back in place where all are read.

    Args:
        selection: Channels of the unit.
        dim: Dimension of the channels.
        opens: Whether what follows reads all channels.
    """

    def __init__(self, selection: Selection, dim: int, *, opens: bool) -> None:
        super().__init__()
        self.selection, self.dim, self.opens = selection, dim, opens
        self.channels_last = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Mask and spread."""
        selection = self.selection
        if selection.mask is not None:
            mask = selection.mask if selection.index is None else selection.mask.index_select(-1, selection.index)
            places = inputs.ndim - mask.ndim
            shape = (*mask.shape, *[1] * places) if self.dim == 1 else (*mask.shape[:-1], *[1] * places, mask.shape[-1])
            inputs = inputs * mask.view(shape).to(inputs.dtype)
        whole = spread(inputs, selection, self.dim) if self.opens and selection.index is not None else inputs
        return in_layout(whole, self.channels_last)

"""Which channels of a unit the input at hand needs: written by the layer that computes them, read by all that follow."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_peft_plugins.pruning._ftwt.skipping.native import Part
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import chosen
from lightning_peft_plugins.pruning._ftwt.skipping.values import readable


@dataclass(frozen=True)
class Choice:
    """Channels of one unit for one call.

    Attributes:
        channels: Channels of the unit.
        count: How many of them are chosen; the rest stays zero.
        index: Positions of the channels, those that round their number up included, shape ``(k,)``; ``None`` when all are
            computed.
        mask: What each sample needs of all channels, shape ``(..., channels)``; ``None`` for a single sample.
    """

    channels: int
    count: int
    index: Tensor | None = None
    mask: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of channels in memory."""
        return self.channels if self.index is None else self.index.shape[0]

    @property
    def part(self) -> Part:
        """The channels at hand, as the kernels want to know them."""
        return Part(self.count, self.width, self.index)


class Selection:
    """The choices of one unit, call by call.

    For one sample these are the channels its predictor chooses; for several, the channels any of them needs, and a mask that
    takes from each sample what the others need. Their number is rounded up with channels that stay zero, because kernels are
    prepared anew for each size. Each thread has the choice of its own call.

    Args:
        channels: Channels of the unit.
        step: What the number is rounded up to a multiple of.
        fixed: Positions of channels to choose for every input; nobody predicts then.
    """

    def __init__(self, channels: int, step: int, fixed: Tensor | None = None) -> None:
        self.channels, self.step, self.fixed = channels, step, fixed
        self._calls = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"channels": self.channels, "step": self.step, "fixed": self.fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def now(self) -> Choice:
        """The choice of this thread's call; all channels before there is one."""
        choice: Choice | None = getattr(self._calls, "choice", None)
        return Choice(self.channels, self.channels) if choice is None else choice

    def choose(self, logits: Tensor, *, dense: bool) -> None:
        """Choose channels for the samples at hand.

        Args:
            logits: What the predictor says, shape ``(..., channels)``.
            dense: Compute every channel all the same, and mask. So it is where values must not be looked at.
        """
        if dense or not readable(logits) or not logits.numel():
            self._calls.choice = Choice(self.channels, self.channels, None, chosen(logits))
            return
        single = logits.shape[:-1].numel() == 1
        if single and logits.is_cpu:
            self._choose_quickly(logits)
            return
        mask = chosen(logits)
        active = (mask.flatten() if single else mask.flatten(0, -2).any(0)).nonzero().flatten()
        if (size := self._rounded(len(active))) == self.channels:
            self._calls.choice = Choice(self.channels, self.channels, None, mask)
            return
        index = nn.functional.pad(active, (0, size - len(active)))
        self._calls.choice = Choice(self.channels, len(active), index, None if single else mask)

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
            mask = None if count == size else chosen(logits)
            self._calls.choice = Choice(self.channels, self.channels, None, mask)
            return
        index = nn.functional.pad(active, (0, size - count)) if size > count else active
        self._calls.choice = Choice(self.channels, count, index)

    def _rounded(self, count: int) -> int:
        return min(-(-count // self.step) * self.step, self.channels)


def check_channels(inputs: Tensor, dim: int, expected: int, ndim: int | None = None) -> None:
    """Refuse inputs that are not those a layer that selects channels is for.

    Args:
        inputs: Of the layer.
        dim: Dimension of the channels.
        expected: Their number.
        ndim: Number of dimensions, where the layer takes one only.

    Raises:
        RuntimeError: As PyTorch's layers raise for wrong shapes.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return  # sizes are tensors then, and PyTorch's own layers check theirs
    if ndim is not None and inputs.ndim != ndim:
        raise RuntimeError(
            f"A network that skips channels expects inputs of {ndim} dimensions here, the batch first, but got shape "
            f"{tuple(inputs.shape)}; give a single sample a batch of its own: inputs[None]."
        )
    if inputs.shape[dim] != expected:
        raise RuntimeError(
            f"A layer that skips channels expected {expected} of them in dimension {dim}, but got shape {tuple(inputs.shape)}. "
            "Give the network inputs like those it was deployed with, and call it as a whole, in one thread: its layers choose "
            "in each call which channels they pass on."
        )


def in_layout(value: Tensor, channels_last: bool) -> Tensor:
    """Feature maps in a memory layout, other tensors, and those of a recorded course, as they are."""
    if value.ndim != 4 or not readable(value):
        return value
    return value.contiguous(memory_format=memory_format(channels_last))


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's name of a layout, which cannot be pickled."""
    return torch.channels_last if channels_last else torch.contiguous_format


def spread(value: Tensor, choice: Choice, dim: int) -> Tensor:
    """Put selected channels back in their places, with zeros in between."""
    assert choice.index is not None
    shape = list(value.shape)
    shape[dim] = choice.channels
    whole = value.new_zeros(shape)
    return whole.index_copy_(dim, choice.index[: choice.count], value.narrow(dim, 0, choice.count))


class SelectionGate(nn.Module):
    """Ends the part of a unit in which channels must be set to zero; puts them back in place where all are read.

    Args:
        selection: Channels of the unit.
        dim: Dimension of the channels.
        opens: Whether what follows reads all channels.
    """

    fixed: Tensor | None

    def __init__(self, selection: Selection, dim: int, *, opens: bool) -> None:
        super().__init__()
        self.selection, self.dim, self.opens = selection, dim, opens
        self.register_buffer("fixed", selection.fixed, persistent=False)  # goes with the module from device to device
        self.channels_last = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Mask and spread."""
        choice = self.selection.now
        if self.fixed is not None:
            choice = Choice(self.selection.channels, len(self.fixed), self.fixed)
        check_channels(inputs, self.dim, choice.width)
        if choice.mask is not None:
            mask = choice.mask if choice.index is None else choice.mask.index_select(-1, choice.index)
            inputs = inputs * _beside(mask.to(inputs.dtype), inputs.ndim, self.dim)
        whole = spread(inputs, choice, self.dim) if self.opens and choice.index is not None else inputs
        return in_layout(whole, self.channels_last)


def _beside(mask: Tensor, ndim: int, dim: int) -> Tensor:
    """A mask with a dimension for every place of the values it is for."""
    for _ in range(ndim - mask.ndim):
        mask = mask.unsqueeze(-1 if dim == 1 else -2)
    return mask

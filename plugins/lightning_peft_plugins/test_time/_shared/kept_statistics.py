"""Statistics that BatchNorm layers predicted with, for a module that is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

Moments: TypeAlias = tuple[float, Tensor, Tensor]
"""Number of values, mean, and biased variance of each channel."""


class KeptStatistics:
    """Remembers what BatchNorm layers normalised the last predictions with, and makes it their running statistics.

    A module that predicted with statistics of its batches predicts otherwise with those of the source. What is kept are those
    of the last batch; of a batch smaller than others before it, only in proportion: the rest comes from the batches before.
    """

    def __init__(self) -> None:
        self._predicting = False
        self._seen: dict[nn.Module, list[Moments]] = {}
        self._kept: dict[nn.Module, Moments] = {}

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Remember what is seen inside: a pass whose output is the prediction."""
        self._predicting, self._seen = True, {}
        try:
            yield
        finally:
            self._predicting = False
        for layer, moments in self._seen.items():
            self._add(layer, pooled(moments))

    def see(self, layer: nn.Module, values: int, mean: Tensor, variance: Tensor) -> None:
        """Take note of what a layer normalises with, if that is a prediction."""
        if self._predicting:
            self._seen.setdefault(layer, []).append((float(values), mean, variance))

    def see_batch(self, layer: nn.Module, x: Tensor) -> None:
        """Take note of the statistics of a batch, shape ``(samples, channels, ...)``."""
        if self._predicting:
            x = x.detach()
            variance, mean = torch.var_mean(
                x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.ndim)], correction=0
            )
            self.see(layer, x.numel() // x.shape[1], mean, variance)

    @torch.no_grad()
    def leave(self) -> None:
        """Put them into the layers."""
        for layer, (_, mean, variance) in self._kept.items():
            for name, value in (("running_mean", mean), ("running_var", variance)):
                running = layer.get_buffer(name)
                running.copy_(torch.where(value.isfinite(), value, running))  # on whatever device the module is by now

    def _add(self, layer: nn.Module, new: Moments) -> None:
        largest, *_ = old = self._kept.get(layer, new)
        share = min(1.0, new[0] / largest)
        _, mean, variance = pooled([(1 - share, *old[1:]), (share, *new[1:])])
        self._kept[layer] = (max(largest, new[0]), mean, variance)


def pooled(parts: Sequence[Moments]) -> Moments:
    """Moments of several batches taken together.

    Example:
        >>> first, second = (1.0, torch.tensor(0.0), torch.tensor(1.0)), (3.0, torch.tensor(4.0), torch.tensor(1.0))
        >>> pooled([first, second])
        (4.0, tensor(3.), tensor(4.))
    """
    parts = [part for part in parts if part[0] > 0]
    total = sum(weight for weight, *_ in parts)
    mean = torch.stack([weight / total * mean for weight, mean, _ in parts]).sum(0)
    spread = [weight / total * (variance + (own - mean) ** 2) for weight, own, variance in parts]
    return total, mean, torch.stack(spread).sum(0)

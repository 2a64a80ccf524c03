"""Which statistics BatchNorm layers normalise with during adaptation: those of the batch, or a blend with the source's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.capture.shim import Shim
from lightning_peft_plugins.test_time._shared.kept_statistics import KeptStatistics

BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norms(network: nn.Module) -> dict[str, BatchNorm]:
    """BatchNorm layers that carry running statistics, timm's fused ones included, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


class UseBatchStatistics:
    """Makes BatchNorm layers normalise with the statistics of each batch, in training and in evaluation mode alike.

    Without running statistics a BatchNorm layer has no others, whatever ``eval()`` says and whoever says it (Tent, Wang et al.,
    ICLR 2021). The layers keep theirs, for whoever moves, copies, saves or averages the module meanwhile; a twin without them
    answers the calls. One value a channel has no variance: a layer that is given no more normalises with its own statistics.

    Args:
        layers: The layers.
        kept: Is shown the statistics of every call.
    """

    def __init__(self, layers: Iterable[BatchNorm], kept: KeptStatistics | None = None) -> None:
        handlers = {layer: partial(_of_the_batch, layer, kept or KeptStatistics()) for layer in layers}
        self._shims = [Shim(layer, "forward", handler, traced=False).install() for layer, handler in handlers.items()]

    def restore(self) -> None:
        """Let the layers answer for themselves."""
        for shim in self._shims:
            shim.remove()
        self._shims = []


def _of_the_batch(
    layer: BatchNorm, kept: KeptStatistics, inner: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if has_one_value(x):
        twin = _twin(layer, layer.running_mean, layer.running_var)
    else:
        twin = _twin(layer, None, None)
        kept.see_batch(layer, x)
    output: Tensor = twin.forward(x, *args, **kwargs)
    return output


def has_one_value(x: Tensor) -> bool:
    """Whether every channel of ``(samples, channels, ...)`` has a single value, which has no variance.

    Example:
        >>> has_one_value(torch.zeros(1, 8, 1, 1)), has_one_value(torch.zeros(1, 8, 2, 1)), has_one_value(torch.zeros(2, 8))
        (True, False, False)
    """
    return x.ndim > 1 and x.numel() == x.shape[1]


def _twin(layer: BatchNorm, mean: Tensor | None, variance: Tensor | None) -> BatchNorm:
    """An object that shares everything with a layer, but normalises with these statistics, or with the batch's.

    Tensors of its own, because autograd notices when a layer's own statistics are written while a graph of it is alive.
    """
    twin: BatchNorm = object.__new__(type(layer))  # what fully_shard makes of a class builds another object
    buffers = {**layer._buffers, "running_mean": mean, "running_var": variance}
    twin.__dict__ = {**vars(layer), "_buffers": buffers, "track_running_stats": mean is not None}
    if mean is not None:
        twin.__dict__["training"] = False
    twin.__dict__.pop("forward", None)  # the shim, which would send the call here again
    return twin


class SourceStatistics:
    """Running statistics of BatchNorm layers as they were, to return to."""

    def __init__(self, layers: Iterable[BatchNorm]) -> None:
        self._source = [(m, m.running_mean.clone(), m.running_var.clone()) for m in layers]  # type: ignore[union-attr]

    def reset(self) -> None:
        """Put the source's statistics in place."""
        for layer, mean, variance in self._source:
            layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            layer.running_var.copy_(variance)  # type: ignore[union-attr]


class BlendStatistics(SourceStatistics):
    """Moves the running statistics of BatchNorm layers towards those of each batch that comes, for that batch only or for good.

    Each call normalises with ``(1 - weight) * base + weight * batch``, with the unbiased variance, as in the official code of
    BN adaptation. The base is the source's; with ``accumulate`` it is the blend of the batch before, which becomes the
    layer's running statistics. A layer that is given one value a channel normalises with the base.

    Args:
        layers: The layers, in evaluation mode when they are called.
        weight: Weight of the batch, in [0, 1].
        accumulate: Keep what was blended as the base of the next batch.
        kept: Is shown the blend of every call.
    """

    def __init__(
        self, layers: Iterable[BatchNorm], weight: float, accumulate: bool = False, kept: KeptStatistics | None = None
    ) -> None:
        self._kept = kept or KeptStatistics()
        self._weight = weight
        self._accumulate = accumulate
        super().__init__(layers)
        self._shims = [
            Shim(layer, "forward", partial(self._forward, layer, mean, variance), traced=False).install()
            for layer, mean, variance in self._source
        ]

    def _forward(
        self,
        layer: BatchNorm,
        mean: Tensor,
        variance: Tensor,
        inner: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        output: Tensor = _twin(layer, *self._blend(layer, x, mean, variance)).forward(x, *args)
        return output

    def _blend(self, layer: BatchNorm, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        base = (layer.running_mean, layer.running_var) if self._accumulate else (mean, variance)
        if has_one_value(x):
            return base
        over = [0, *range(2, x.ndim)]
        batch_variance, batch_mean = torch.var_mean(x.detach().to(mean.dtype), over, correction=1)
        blend = torch.lerp(base[0], batch_mean, self._weight), torch.lerp(base[1], batch_variance, self._weight)
        self._kept.see(layer, x.numel() // x.shape[1], *blend)
        if self._accumulate:
            _move(layer, *blend)
        return blend

    def restore(self) -> None:
        """Give the layers their own forward pass back; the statistics stay as they are."""
        for shim in self._shims:
            shim.remove()
        self._shims = []


class RobustStatistics(SourceStatistics):
    """Makes BatchNorm layers normalise with running statistics that move a little with every batch of an update.

    In an update a layer normalises with ``(1 - momentum) * running + momentum * batch`` (biased variance), whose batch part
    carries a gradient, and keeps that as its running statistics (RobustBN; Yuan et al., CVPR 2023, eq. 3). Otherwise, and
    where it is given one value a channel, it is the layer it was. The statistics move where they are, so that a network called
    with other tensors for them moves those.

    Args:
        layers: The layers, in evaluation mode when they are called.
        momentum: Weight of the batch.
    """

    def __init__(self, layers: Iterable[BatchNorm], momentum: float) -> None:
        self._momentum = momentum
        self._moving = False
        super().__init__(layers)
        self._shims = [
            Shim(layer, "forward", partial(self._forward, layer), traced=False).install() for layer, *_ in self._source
        ]

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Move the statistics with every call inside."""
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    def _forward(self, layer: BatchNorm, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self._moving:
            return inner(x)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if has_one_value(x):
            output: Tensor = _twin(layer, layer.running_mean.clone(), layer.running_var.clone()).forward(x)
            return output
        over = [0, *range(2, x.ndim)]
        batch_variance, batch_mean = torch.var_mean(x.to(layer.running_mean.dtype), over, correction=0)
        mean = (1 - self._momentum) * layer.running_mean + self._momentum * batch_mean
        variance = (1 - self._momentum) * layer.running_var + self._momentum * batch_variance
        _move(layer, mean, variance)
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = (variance + layer.eps).rsqrt()
        scale = scale if layer.weight is None else scale * layer.weight
        y = (x - mean.view(shape)) * scale.view(shape)
        y = y if layer.bias is None else y + layer.bias.view(shape)
        for name in ("drop", "act"):  # timm's BatchNormAct2d goes on from here
            y = getattr(layer, name, _same)(y)
        return y.to(x.dtype)

    def restore(self) -> None:
        """Give the layers their own forward pass back; the statistics stay as they are."""
        for shim in self._shims:
            shim.remove()
        self._shims = []


@torch.no_grad()
def _move(layer: BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Write a layer's running statistics, but for channels that are not finite, which would stay so for good."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    finite = mean.isfinite() & variance.isfinite()
    layer.running_mean.copy_(torch.where(finite, mean, layer.running_mean))
    layer.running_var.copy_(torch.where(finite, variance, layer.running_var))


def _same(x: Tensor) -> Tensor:
    return x

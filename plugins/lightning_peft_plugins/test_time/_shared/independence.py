"""Whether samples of a batch depend on each other: parts of it against the whole, on the batch at hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.capture.evaluation import Call, Passes
from lightning_peft.capture.once_more import RandomState

SINGLES = 8  # samples that are run alone, spread over the batch
TF32 = 2.0**-10  # what CUDA may compute convolutions of float32 with


@dataclass(frozen=True)
class Comparison:
    """Parts of a batch beside the whole.

    Attributes:
        difference: Largest difference of a logit, relative to the largest logit; infinite where parts cannot be compared, NaN
            where no logit is finite.
        tolerance: Up to which a difference is rounding.
        reason: What differs, to end a sentence with.
    """

    difference: float
    tolerance: float
    reason: str

    @property
    def independent(self) -> bool:
        """Whether parts give what the whole batch gives."""
        return self.difference <= self.tolerance


def compare_parts(call: Call, predict: Callable[[Any], Tensor], network: nn.Module) -> Comparison:
    """Run a batch whole and in parts: its halves, and some samples alone. Leaves no trace in the network or its random numbers.

    Couplings that no list of layers knows show here: statistics by hand, attention over the batch, inputs whose samples do not
    lie along dimension 0.

    Args:
        call: At least two samples.
        predict: Reads logits of shape (samples, positions, classes) out of an output.
        network: Whose buffers are kept.
    """
    call = _uncounted(call)
    with without_trace(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a network says of parts is not the user's concern
        whole = predict(call())
        tolerance = _tolerance(whole)
        worst = math.nan
        for rows in _parts(call.size):
            try:
                part = predict(call.take(rows)())
            except Exception as error:  # whatever a network says to a batch it was not made for
                return Comparison(math.inf, tolerance, f"a part of it cannot be run ({type(error).__name__}: {error})")
            if len(whole) != call.size or part.shape != (len(rows), *whole.shape[1:]):
                shapes = f"{call.size} samples have logits in {len(whole)} rows, {len(rows)} have them in {len(part)}"
                return Comparison(math.inf, tolerance, shapes)
            worst = _larger(worst, _difference(part, whole[rows], whole))
            if worst > tolerance:
                break
    return Comparison(
        worst, tolerance, f"logits of a part differ from those of the whole by {worst:.2g} of the largest, not by rounding"
    )


@contextmanager
def without_trace(network: nn.Module) -> Iterator[None]:
    """Run a network without a graph, and leave its buffers and random numbers as they were."""
    with torch.no_grad(), _buffers_kept(network), RandomState().again():
        yield


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    """Give buffers that were written what they held; the others stay untouched, because a graph may have saved them."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _parts(size: int) -> Iterator[Tensor]:
    yield from torch.arange(size).tensor_split(2)
    for row in sorted({round(place) for place in torch.linspace(0, size - 1, min(size, SINGLES)).tolist()}):
        yield torch.tensor([row])


def _difference(part: Tensor, same: Tensor, whole: Tensor) -> float:
    """Relative difference where both are finite; infinite where only one is; NaN where none is."""
    finite = part.isfinite()
    if not torch.equal(finite, same.isfinite()):
        return math.inf
    if not bool(finite.any()):
        return math.nan
    scale = float(whole[whole.isfinite()].abs().max().clamp(min=torch.finfo(whole.dtype).tiny))
    return float((part[finite].double() - same[finite].double()).abs().max()) / scale


def _larger(first: float, second: float) -> float:
    return second if math.isnan(first) else first if math.isnan(second) else max(first, second)


def _tolerance(logits: Tensor) -> float:
    """Half the digits of what the network computes with: kernels for few samples add up in another order."""
    device = logits.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else logits.dtype
    eps = torch.finfo(dtype).eps
    return math.sqrt(max(eps, TF32) if device == "cuda" and dtype == torch.float32 else eps)


def _uncounted(call: Call) -> Call:
    """The same call past what counts the samples a method runs: this is no work of its own, and done once."""
    forward = call.forward
    if isinstance(forward, partial) and isinstance(getattr(forward.func, "__self__", None), Passes):
        return replace(call, forward=forward.args[0])
    return call

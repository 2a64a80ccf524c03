"""Samples that are NaN or infinite: they are predicted, and nothing is learnt from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.capture.evaluation import Call
from lightning_peft.network.batches import join, take, tensors_of


def without_spoilt_samples(call: Call, update: Callable[[Call], Any], logits: Callable[[Any], Tensor]) -> Any:
    """Adapt to the samples of a call but those that the network makes nothing finite of; return the output for all.

    Through statistics of the batch one such sample would spoil the predictions of all others. Numbers that are not finite may
    be meant (missing values, a mask to add), so the network is asked: samples with such inputs are run on their own first.

    Args:
        call: The samples.
        update: Adapts to samples and returns their output.
        logits: Reads logits out of an output.
    """
    suspects = suspects_of(call)
    if not len(suspects):
        return update(call)
    output = call.take(suspects)()
    answers = logits(output)
    if len(answers) != len(suspects):  # rows that are no samples
        return update(call)
    spoilt = suspects[~finite_rows(answers)]
    sound = torch.tensor(sorted({*range(call.size)} - {*spoilt.tolist()}), device=suspects.device)
    if not len(spoilt):
        return update(call)
    if not len(sound):
        return call()
    rest = take(output, len(suspects), (~finite_rows(answers)).nonzero().squeeze(-1))
    adapted = update(call.take(sound))
    try:
        both = join([adapted, rest], [len(sound), len(spoilt)])
    except MisconfigurationException:  # a value of the whole batch, which is then that of the sound samples
        return adapted
    return take(both, call.size, torch.cat([sound, spoilt]).argsort())


def finite_rows(logits: Tensor) -> Tensor:
    """Which samples have finite logits only, shape ``(samples,)``.

    Example:
        >>> finite_rows(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
        tensor([ True, False])
    """
    return logits.isfinite().flatten(1).all(-1)


def sound_rows(call: Call) -> Tensor:
    """Indices of the samples whose floating point inputs are finite."""
    return torch.tensor(sorted({*range(call.size)} - {*suspects_of(call).tolist()}), dtype=torch.int64)


def suspects_of(call: Call) -> Tensor:
    """Indices of the samples with floating point inputs that are NaN or infinite."""
    tensors = [t for t in tensors_of((call.args, call.kwargs)) if t.ndim and t.is_floating_point() and len(t) == call.size]
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    odd = torch.stack([~finite_rows(tensor.reshape(len(tensor), -1)) for tensor in tensors]).any(0)
    return odd.nonzero().squeeze(-1)

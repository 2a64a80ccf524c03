"""Which positions of a sequence are predictions, and which are padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lightning_peft.capture.evaluation import Call

MASK = "attention_mask"


def attention_mask(call: Call) -> Tensor | None:
    """Find the mask of a call, given by name, by position, or in a mapping such as a tokenizer's output.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> def forward(input_ids, attention_mask=None): ...
        >>> attention_mask(Call(forward, (mask, mask), {})) is mask, attention_mask(Call(forward, (mask,), {})) is None
        (True, True)
    """
    return next((value for value in _candidates(call) if isinstance(value, Tensor)), None)


def _candidates(call: Call) -> Iterator[Any]:
    yield call.kwargs.get(MASK)
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Mapping):  # a BatchEncoding too
            yield value.get(MASK)
    if len(call.args) > 1:
        yield from _by_position(call)


def _by_position(call: Call) -> Iterator[Any]:
    try:
        names = list(inspect.signature(_innermost(call.forward)).parameters)
    except (TypeError, ValueError):  # compiled code has no signature
        return
    if MASK in names[: len(call.args)]:
        yield call.args[names.index(MASK)]


def _innermost(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The network's own forward pass behind what counts its calls."""
    while isinstance(forward, partial) and forward.args and callable(forward.args[0]):
        forward = forward.args[0]
    return forward

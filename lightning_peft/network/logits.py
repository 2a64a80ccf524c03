"""Logits in what a network returned, and others in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def as_logits(output: Any) -> Tensor:
    """Read logits out of what a network returned.

    Args:
        output: A tensor, a mapping or object with ``logits`` (HF ``ModelOutput``), or a tuple whose first tensor counts.

    Returns:
        The logits, whatever their shape.

    Raises:
        MisconfigurationException: Nothing in the output can be read as logits.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor):
                return item
    keys = f" with keys {list(output)}" if isinstance(output, Mapping) else ""
    raise MisconfigurationException(
        f"The network returned {type(output).__name__}{keys}, in which no logits were found. Return a tensor, a tuple whose "
        'first tensor is the logits, or something with "logits".'
    )


def with_logits(output: Any, logits: Tensor) -> Any:
    """Put other logits in the place of those that :func:`as_logits` finds.

    Example:
        >>> import torch
        >>> with_logits({"logits": torch.zeros(1), "loss": None}, torch.ones(1))
        {'logits': tensor([1.]), 'loss': None}
    """
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, Mapping):  # a ModelOutput too
        return type(output)(**{key: logits if key == "logits" else value for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        old = as_logits(output)
        items = [logits if item is old else item for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = copy.copy(output)
    changed.logits = logits
    return changed

"""Labels in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def labels_of(batch: Any) -> Tensor | None:
    """Return the class indices in a batch: the last tensor of a pair, or a mapping's ``labels``; ``None`` when unclear.

    Example:
        >>> import torch
        >>> labels_of((torch.zeros(2, 3), torch.tensor([0, 1])))
        tensor([0, 1])
    """
    found: Any = None
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        found = batch[-1]
    is_index = isinstance(found, Tensor) and found.ndim == 1 and not found.is_floating_point()
    return found if is_index else None

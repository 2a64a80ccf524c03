"""Labels in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def labels_of(batch: Any) -> Tensor | None:
    """Return the class indices in a batch: the one vector of integers behind the inputs, or a mapping's ``labels``.

    ``None`` when there is none, or several: labels and sample indices, say.

    Example:
        >>> import torch
        >>> inputs, labels = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> labels_of((inputs, labels)), labels_of((inputs, labels, torch.tensor([7, 5])))
        (tensor([0, 1]), None)
    """
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        found = [batch[key] for key in LABEL_KEYS if key in batch][:1]
    else:
        found = list(batch[1:]) if isinstance(batch, (tuple, list)) else []
    indices = [each for each in found if isinstance(each, Tensor) and each.ndim == 1 and not each.is_floating_point()]
    return indices[0] if len(indices) == 1 else None

"""Reading the dataset index out of a batch by a path such as ``"2"``, ``"index"`` or ``"meta.index"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def index_in_batch(batch: Any, path: str) -> Tensor:
    """Return the sample indices a batch carries.

    Args:
        batch: The batch ``training_step`` was given.
        path: Mapping keys, positions in a sequence and attribute names, joined by dots.

    Returns:
        Indices, shape ``(batch,)``, int64, on the CPU. An index that was moved to an accelerator has to be waited for.

    Raises:
        MisconfigurationException: The path leads nowhere (the message lists what is there), or not to integers.

    Example:
        >>> index_in_batch({"image": None, "meta": {"index": [3, 1]}}, "meta.index")
        tensor([3, 1])
    """
    value = batch
    for part in path.split("."):
        value = _step_into(value, part, path)
    try:
        index = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        index = None
    if index is None or index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        shown = f"a tensor of {index.dtype}, shape {tuple(index.shape)}" if index is not None else f"a {type(value).__name__}"
        raise MisconfigurationException(
            f"sample_index={path!r} leads to {shown} in the batch; it must be one integer per sample: the sample's position in "
            "the dataset."
        )
    return index.to(device="cpu", dtype=torch.int64)


def _step_into(value: Any, part: str, path: str) -> Any:
    number = int(part) if part.lstrip("-").isdigit() else None
    if isinstance(value, Mapping):
        for key in (part, number):
            if key in value:
                return value[key]
        has = f"the keys {list(value)}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if number is not None and -len(value) <= number < len(value):
            return value[number]
        if part in getattr(value, "_fields", ()):  # a named tuple
            return getattr(value, part)
        has = f"{len(value)} items (positions 0 to {len(value) - 1})"
    else:
        if part in getattr(value, "__dict__", ()) and not isinstance(value, Tensor):
            return getattr(value, part)
        has = f"a single {type(value).__name__}"
    raise MisconfigurationException(
        f"sample_index={path!r}: {part!r} is not in the batch, which has {has} there. Let the dataset return each sample's "
        'index and name its place, or use sample_index="auto" to follow the training loader.'
    )

"""Samples of a batch, whatever its structure: nested containers of tensors with samples along dimension 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order.

    Example:
        >>> [t.shape for t in tensors_of({"x": torch.zeros(2, 3), "y": (torch.zeros(2), "label")})]
        [torch.Size([2, 3]), torch.Size([2])]
    """
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor that has a dimension; 0 when there is none.

    Example:
        >>> batch_size({"input_ids": torch.zeros(4, 7)})
        4
    """
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), 0)


def take(batch: Any, size: int, samples: slice | Tensor) -> Any:
    """Some samples of a batch of ``size``; tensors without the batch dimension stay whole.

    Example:
        >>> take((torch.arange(4), torch.tensor(1.0)), 4, slice(1, 3))
        (tensor([1, 2]), tensor(1.))
    """
    return apply_to_collection(batch, Tensor, lambda t: t[samples] if t.ndim and len(t) == size else t)


def join(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Put the outputs of parts of a batch together again: tensors, mappings, Hugging Face outputs, tuples, lists.

    Args:
        parts: Outputs of one structure, samples along dimension 0.
        sizes: Samples in each part.

    Raises:
        MisconfigurationException: A value is neither a per-sample tensor nor the same in all parts, for instance a loss.

    Example:
        >>> join([{"logits": torch.zeros(2, 3)}, {"logits": torch.zeros(1, 3)}], [2, 1])["logits"].shape
        torch.Size([3, 3])
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if all(part.ndim and len(part) == size for part, size in zip(parts, sizes, strict=True)):
            return torch.cat(list(parts))
    elif isinstance(first, Mapping):  # a ModelOutput too
        return type(first)(**{key: join([part[key] for part in parts], sizes) for key in first})
    elif isinstance(first, (tuple, list)):
        joined = [join(values, sizes) for values in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    elif (first is None or isinstance(first, (bool, int, float, str))) and all(part == first for part in parts):
        return first
    raise MisconfigurationException(
        f"The network returns {type(first).__name__} values that do not belong to single samples, so its batch cannot be run "
        "in parts. Return per-sample tensors only, or leave the loss to the step."
    )


def separable(output: Any, size: int) -> bool:
    """Whether an output holds nothing but values of single samples, so that :func:`join` can put it together from parts.

    Example:
        >>> separable({"logits": torch.zeros(2, 3)}, 2), separable({"loss": torch.tensor(0.0)}, 2)
        (True, False)
    """
    try:
        join([output], [size])
    except MisconfigurationException:
        return False
    return True


def plain(tensor: Tensor) -> Tensor:
    """Detached, and usable by autograd even if made under ``torch.inference_mode``."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def detached(value: Any) -> Any:
    """The same nested value with its tensors cut off from any graph."""
    return apply_to_collection(value, Tensor, Tensor.detach)

"""A mask that stays for many steps, applied in one pass over the weight and one over its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_words(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into words of ones and zeros, as wide as a number of that type.

    ATen's CPU kernels are not vectorised for boolean masks; an and of words is, and costs as much as a product, at the same
    memory as a mask of floats. It lasts as long as the mask does.

    Example:
        >>> mask_words(torch.tensor([True, False]), torch.float32)
        tensor([-1,  0], dtype=torch.int32)
    """
    return mask.to(_WORDS[dtype.itemsize]).neg_()


def hard_mask(weight: Tensor, mask: Tensor, words: Tensor | None = None, *, regrow: bool = False) -> Tensor:
    """Set pruned weights to zero.

    Args:
        weight: Dense weight, floating point.
        mask: Boolean, of the weight's shape, ``True`` = kept.
        words: :func:`mask_words` of it, where that is faster; not used in a compiled step.
        regrow: Let the gradient through to pruned weights.

    Returns:
        The weight that the layer uses; its gradient is masked too, unless ``regrow``.

    Example:
        >>> weight = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> hard_mask(weight, torch.tensor([True, False])).sum().backward(); weight.grad
        tensor([1., 0.])
    """
    use = words if words is not None and not torch.compiler.is_compiling() else mask
    masked: Tensor = _HardMask.apply(weight, use, regrow)
    return masked


def _keep(values: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.where(mask, values, 0.0)
    return mask.bitwise_and(values.view(mask.dtype)).view(values.dtype)


class _HardMask(torch.autograd.Function):
    """Forward of :func:`hard_mask` and its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, regrow: bool) -> Tensor:
        ctx.save_for_backward(*([] if regrow else [mask]))
        return _keep(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (_keep(grads[0], ctx.saved_tensors[0]) if ctx.saved_tensors else grads[0]), None, None

"""A mask that stays for many steps, applied in one pass over the weight and one over its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.weights.functions import quick


def mask_factor(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into ones and zeros of a type.

    ATen's CPU kernels are not vectorised for boolean masks; a product is, and autograd takes it back without Python. It costs
    the memory of another weight, as long as the mask lasts.

    Example:
        >>> mask_factor(torch.tensor([True, False]), torch.float32)
        tensor([1., 0.])
    """
    return mask.to(dtype)


def hard_mask(weight: Tensor, mask: Tensor, factor: Tensor | None = None, *, regrow: bool = False) -> Tensor:
    """Set pruned weights to zero.

    Args:
        weight: Dense weight, floating point.
        mask: Boolean, of the weight's shape, ``True`` = kept.
        factor: :func:`mask_factor` of it, where that is faster: pruned weights must be finite then; not used in a compiled
            step.
        regrow: Let the gradient through to pruned weights.

    Returns:
        The weight that the layer uses; its gradient is masked too, unless ``regrow``.

    Example:
        >>> weight = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> hard_mask(weight, torch.tensor([True, False])).sum().backward(); weight.grad
        tensor([1., 0.])
    """
    if factor is not None and not torch.compiler.is_compiling():
        if not regrow:
            return weight * factor
        mask = factor
    masked: Tensor = _hard_mask(weight, mask, regrow)
    return masked


def _keep(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0) if mask.dtype is torch.bool else values * mask


class _HardMask(torch.autograd.Function):
    """Forward of :func:`hard_mask` and its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, regrow: bool) -> Tensor:
        return _keep(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        _, mask, regrow = inputs
        ctx.save_for_backward(*([] if regrow else [mask]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (_keep(grads[0], ctx.saved_tensors[0]) if ctx.saved_tensors else grads[0]), None, None


_hard_mask = quick(_HardMask)

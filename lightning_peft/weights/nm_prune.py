"""Training through an N:M mask: the sparse weight with its straight-through gradients, and the decay of pruned weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lightning_peft.weights.functions import quick

_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FEW = 2**12  # values up to which starting one operation more takes longer than the slow one (measured)


def ste_prune(
    weight: Tensor,
    mask: Tensor,
    decay: Tensor | float = 0.0,
    *,
    sr_lambda: float = 0.0,
    masked_grad: bool = False,
) -> Tensor:
    """Sparse weight ``weight * (mask + (1 - mask) * decay)`` whose gradient reaches pruned weights too.

    The gradient passes unchanged (straight-through estimator), plus ``sr_lambda * (1 - mask) * weight``, which pulls
    pruned weights to zero (SR-STE, Zhou et al., ICLR 2021, arXiv 2102.04010). With ``masked_grad`` it is first multiplied
    as the weight was, the progressively restricted gradient flow of Bambhaniya et al. (2024) as its abstract says it;
    their published code leaves it unchanged.

    Args:
        weight: Dense weight, floating point.
        mask: Boolean, of the weight's shape, ``True`` = kept.
        decay: Factor of the pruned weights in [0, 1], a number or a tensor without dimensions (a value that changes
            recompiles nothing). It gets no gradient. Kept weights are exact for every decay.
        sr_lambda: Strength of the SR-STE term; 2e-4 in the paper.
        masked_grad: Multiply the incoming gradient by ``mask + (1 - mask) * decay``.

    Returns:
        The weight that the layer uses, of the weight's shape and dtype.

    Raises:
        MisconfigurationException: If the mask is not boolean or not of the weight's shape, or a number outside [0, 1] is
            given as decay.

    Example:
        >>> w = torch.tensor([0.1, -0.4, 0.3, 0.2], requires_grad=True)
        >>> mask = torch.tensor([False, True, True, False])
        >>> ste_prune(w, mask).tolist() == [0.0, w[1].item(), w[2].item(), 0.0]
        True
        >>> ste_prune(w, mask, decay=0.5).sum().backward(); w.grad
        tensor([1., 1., 1., 1.])
    """
    if mask.dtype is not torch.bool or mask.shape != weight.shape:
        raise MisconfigurationException(
            f"ste_prune needs a boolean mask of the weight's shape {tuple(weight.shape)}, got {mask.dtype} "
            f"{tuple(mask.shape)}. Make it with nm_mask(weight, n, m, dim), or mask.bool()."
        )
    if not isinstance(decay, Tensor):
        decay = float(decay)
        if not 0.0 <= decay <= 1.0:
            raise MisconfigurationException(f"decay is the factor on pruned weights and must lie in [0, 1], got {decay}.")
    pruned: Tensor = _ste_prune(weight, mask, decay, float(sr_lambda), masked_grad)
    return pruned


def pruned_values(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` where pruned, zero where kept.

    Example:
        >>> pruned_values(torch.tensor([2.0, -4.0]), torch.tensor([True, False]))
        tensor([ 0., -4.])
    """
    return _select(weight, mask, pruned=True)


def decay_linear(step: float, coef: float) -> float:
    """MDGF-linear factor of pruned weights, ``max(0, 1 - coef * step)`` (Bambhaniya et al., 2024).

    Args:
        step: Units since the dense phase ended (optimizer updates in the paper's code).
        coef: Decrease per unit.

    Example:
        >>> decay_linear(2500, 2e-4), decay_linear(9000, 2e-4)
        (0.5, 0.0)
    """
    return max(0.0, 1.0 - coef * step)


def decay_exponential(step: float, coef: float) -> float:
    """MDGF-exponential factor of pruned weights, ``exp(-coef * step)`` (Bambhaniya et al., 2024).

    Args:
        step: Units since the dense phase ended (optimizer updates in the paper's code).
        coef: Rate per unit.

    Example:
        >>> round(decay_exponential(5000, 1e-4), 6)
        0.606531
    """
    return math.exp(-coef * step)


def _select(values: Tensor, mask: Tensor, *, pruned: bool = False) -> Tensor:
    """``values`` where the mask says kept (or pruned), zero elsewhere."""
    if torch.compiler.is_compiling() or not values.is_cpu or values.numel() <= _FEW or values.element_size() not in _INT:
        return torch.where(mask, 0.0, values) if pruned else torch.where(mask, values, 0.0)
    # ATen's CPU where and masked_fill are not vectorised for boolean masks. A mask byte becomes a word of ones or
    # zeros and is and-ed with the bits of the value (docs/evidence/nm_mask.md).
    signs = mask.view(torch.int8)
    signs = signs - 1 if pruned else signs.neg()
    word = _INT[values.element_size()]
    return signs.to(word).bitwise_and_(values.view(word)).view(values.dtype)


def _scale(values: Tensor, mask: Tensor, decay: Tensor | float) -> Tensor:
    """``values`` where kept, ``values * decay`` where pruned."""
    if not isinstance(decay, Tensor) and decay == 0.0:
        return _select(values, mask)
    if torch.compiler.is_compiling() or values.device.type != "cpu" or is_functorch_wrapped_tensor(values):
        return torch.where(mask, values, values * decay)
    factor = mask.to(values.dtype)
    factor = factor.clamp_(min=decay.to(values.dtype)) if isinstance(decay, Tensor) else factor.clamp_(min=decay)
    return factor.mul_(values)


class _STEPrune(torch.autograd.Function):
    """Forward of :func:`ste_prune` and its two gradients; keeps nothing for the plain straight-through estimator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: Tensor | float, sr_lambda: float, masked_grad: bool) -> Tensor:
        return _scale(weight, mask, decay)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | float, float, bool], output: Tensor) -> None:
        weight, mask, decay, sr_lambda, masked_grad = inputs
        ctx.sr_lambda, ctx.masked_grad = sr_lambda, masked_grad
        ctx.decay_value = None if isinstance(decay, Tensor) else decay
        saved = [mask] if sr_lambda or masked_grad else []
        if sr_lambda:
            saved.append(weight)
        if masked_grad and isinstance(decay, Tensor):
            saved.append(decay)
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = grads[0]
        saved = ctx.saved_tensors
        if ctx.masked_grad:
            grad = _scale(grad, saved[0], saved[-1] if ctx.decay_value is None else ctx.decay_value)
        if ctx.sr_lambda:
            grad = torch.add(grad, _select(saved[1], saved[0], pruned=True), alpha=ctx.sr_lambda)
        return grad, None, None, None, None


_ste_prune = quick(_STEPrune)

"""Weight compander: the function between a stored value and the weight it stands for, its inverse, and its scales.

Weight Compander (Cakaj, Mehnert, Yang, IJCNN 2023, arXiv 2306.16993) reparametrises every weight by one nonlinear function that
bounds its magnitude and drives it away from zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from lightning_peft.weights.functions import as_type, quick


def compand(v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Weight of a stored value: ``w = a arctan(v / b)``.

    Equation 1 of the paper. Odd, strictly increasing, ``|w| < a pi / 2``, slope ``a / b`` at zero. Half-precision values are
    computed in float32. Differentiable any number of times, in ``v``, ``a`` and ``b``; keeps nothing for the backward pass but
    ``v`` and the result.

    Args:
        v: Stored values, any shape.
        a: Scale of the result, positive: a number, or a tensor with one element and no more dimensions than ``v``.
        b: Scale of the argument, likewise.

    Returns:
        Weights, same shape and dtype as ``v``.

    Example:
        >>> compand(torch.tensor([-1.0, 0.0, 1.0]), a=2.0, b=1.0)
        tensor([-1.5708,  0.0000,  1.5708])
    """
    dtype = _compute_dtype(v)
    result: Tensor = _compand(v, _scalar(a, v, dtype), _scalar(b, v, dtype))
    return result


def compand_inverse(w: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Stored value of a weight, equation 4: ``v = b tan(w / a)``.

    Args:
        w: Weights, any shape.
        a: As in :func:`compand`.
        b: As in :func:`compand`.

    Returns:
        Stored values, same shape and dtype as ``w``.

    Raises:
        ValueError: A weight lies on or beyond the bound ``a pi / 2``, where there is no inverse.

    Example:
        >>> compand_inverse(compand(torch.tensor([0.5]), 2.0, 1.0), 2.0, 1.0)
        tensor([0.5000])
    """
    dtype = _compute_dtype(w)
    a, b = _scalar(a, w, dtype), _scalar(b, w, dtype)
    angle = w.to(dtype) / a
    if not bool((angle.abs() < math.pi / 2).all()):
        raise ValueError(f"a weight is NaN or not below the bound {float(a) * math.pi / 2:.4g}; choose a larger a")
    return (b * torch.tan(angle)).to(w.dtype)


def weight_decay_gradient(v: Tensor, a: float, b: float, strength: float) -> Tensor:
    """Gradient, in the stored value, of ``strength / 2`` times the squared weight: ``strength w dw/dv``.

    The version of the paper with fixed scales decays weights, not stored values.

    Args:
        v: Stored values, any shape.
        a: As in :func:`compand`.
        b: As in :func:`compand`.
        strength: Weight decay of the optimizer.

    Returns:
        Gradient, same shape and dtype as ``v``.

    Example:
        >>> weight_decay_gradient(torch.tensor([0.0, 1.0]), a=1.0, b=1.0, strength=2.0)  # 2 * (pi / 4) * (1 / 2)
        tensor([0.0000, 0.7854])
    """
    ratio = v.to(_compute_dtype(v)) / b
    return (strength * a * a / b * torch.atan(ratio) / (1 + ratio * ratio)).to(v.dtype)


def compander_scales(weight: Tensor, headroom: float = 2.0, slope: float = 1.0) -> tuple[float, float]:
    """Choose ``log a`` and ``log b`` for a layer from its weights; ours, not the paper's.

    ``a pi / 2 = h max|w|`` with headroom ``h`` and ``b = a / s`` with slope ``s``. Both logarithms are rounded to
    multiples of 1/16 (``log a`` upwards), which bfloat16 and float16 hold exactly: a module converted after attachment keeps
    its function. A layer of zeros takes ``1 / sqrt(fan_in)`` for its largest weight.

    Args:
        weight: Weights of one layer, outputs along dimension 0.
        headroom: Bound over largest magnitude, above 1.
        slope: Slope ``a / b`` of the map at zero, positive.

    Returns:
        ``log a`` and ``log b``.

    Raises:
        ValueError: A weight is not finite, or its stored value would not be.

    Example:
        >>> log_a, log_b = compander_scales(torch.tensor([[0.5, -1.0]]))
        >>> log_a, log_a == log_b, math.exp(log_a) * math.pi / 2 >= 2.0
        (0.25, True, True)
    """
    peak = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if not math.isfinite(peak):
        raise ValueError("it holds weights that are NaN or infinite")
    if peak < _ZERO:
        peak = max(1, weight[:1].numel()) ** -0.5
    log_a = math.ceil(_GRID * math.log(headroom * peak * 2 / math.pi)) / _GRID
    log_b = round(_GRID * (log_a - math.log(slope))) / _GRID
    largest = log_b + math.log(math.tan(peak * math.exp(-log_a)))
    if largest > math.log(torch.finfo(weight.dtype).max):
        raise ValueError(f"its largest weight, {peak:.3g}, has no stored value within {weight.dtype}")
    return log_a, log_b


PUBLISHED: Mapping[str, tuple[float, float]] = {
    "resnet18/cifar10": (1.0, 0.6),
    "resnet18/cifar100": (0.6, 0.6),
    "resnet34/cifar10": (0.8, 0.5),
    "resnet34/cifar100": (0.7, 0.8),
    "resnet50/cifar10": (1.0, 0.6),
    "resnet50/cifar100": (1.0, 0.8),
    "resnet50/imagenet": (0.6, 0.7),
    "vgg16/cifar10": (0.7, 0.7),
    "vgg16/cifar100": (0.7, 1.0),
    "vgg19/cifar10": (0.5, 0.7),
    "vgg19/cifar100": (0.7, 0.8),
    "wrn": (0.7, 0.7),
}
"""``a`` and ``b`` of the version with fixed scales, by network and data."""

_GRID = 16
_ZERO = 1e-12  # a layer whose largest weight is below this gives no scale to go by


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _scalar(value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    return as_type(value, dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device=like.device)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1))


class _Compand(Function):
    """The gradients of ``a`` and ``b`` are inner products of what the backward pass holds anyway.

    For a loss L with gradient g at w: dL/dv = g / (b/a + v^2/(ab)), dL/da = <g, w> / a, dL/db = -<dL/dv, v> / b. Autograd on
    the plain expression takes twice the memory passes and keeps two more copies of every weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return as_type(torch.div(as_type(v, a.dtype), b).atan_().mul_(a), v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        v, a, b = inputs
        ctx.save_for_backward(v, output, a, b)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        v, w, a, b = ctx.saved_tensors  # type: ignore[attr-defined]
        need_v, need_a, need_b = ctx.needs_input_grad  # type: ignore[attr-defined]
        g, x = as_type(grads[0], a.dtype), as_type(v, a.dtype)
        grad_v = grad_a = grad_b = None
        if need_v or need_b:
            t = x * (a.rsqrt() * b.rsqrt())
            # In place where nobody differentiates again: memory passes are what this function costs.
            grad_v = g / (t * t + b / a if torch.is_grad_enabled() else t.mul_(t).add_(b / a))
        if need_a:
            grad_a = _inner(g, as_type(w, a.dtype)) / a
        if need_b and grad_v is not None:
            grad_b = -_inner(grad_v, x) / b
        return (as_type(grad_v, v.dtype) if need_v and grad_v is not None else None), grad_a, grad_b


_compand = quick(_Compand)

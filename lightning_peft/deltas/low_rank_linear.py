"""A frozen linear layer and a low-rank product beside it, in one function of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def low_rank_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """Compute ``x W^T + b + scale (x A^T) B^T``.

    Beside the plain composition it saves passes over the output, forward, and over the gradient of the inputs: the scale and
    the sum are part of the matrix products. Where there are many rows, the sum of both weights is made for the moment of such a
    product, which is less than a pass over the rows; not in half precision, in which small deltas would be lost in it.

    Args:
        inputs: ``x``, shape ``(..., inputs)``.
        weight: ``W``, shape ``(outputs, inputs)``.
        bias: ``b``, shape ``(outputs,)``.
        down: ``A``, shape ``(rank, inputs)``.
        up: ``B``, shape ``(outputs, rank)``.
        scale: Factor of the product.
        dropped: What ``A`` reads in place of ``x``, for instance after dropout.

    Example:
        >>> x, w, a, b = torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), torch.ones(2, 1)
        >>> low_rank_linear(x, w, None, a, b, 0.5)
        tensor([[2., 2.]])
    """
    if torch._C._are_functorch_transforms_active():
        read = inputs if dropped is None else dropped
        return linear(inputs, weight, bias) + scale * linear(linear(read, down), up)
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = [None if tensor is None else tensor.to(dtype) for tensor in (inputs, weight, bias, down, up, dropped)]
        inputs, weight, bias, down, up, dropped = cast  # type: ignore[assignment]
        with torch.autocast(device, enabled=False):
            return _LowRankLinear.apply(inputs, weight, bias, down, up, scale, dropped)  # type: ignore[no-any-return]
    if down.dtype != inputs.dtype:
        down, up = down.to(inputs.dtype), up.to(inputs.dtype)
    return _LowRankLinear.apply(inputs, weight, bias, down, up, scale, dropped)  # type: ignore[no-any-return]


def _cheaper_made(rows: int, weight: Tensor, dropped: Tensor | None) -> bool:
    """Whether to make the sum of the weights twice, forward and backward, in place of passes over outputs and gradients."""
    outputs, inputs = weight.shape
    passes, weights = rows * (outputs + inputs), 2 * outputs * inputs
    return dropped is None and weight.dtype in (torch.float32, torch.float64) and weights * _MARGIN < passes


_MARGIN = 1.5  # where it begins to pay, on two cores


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        rows = _rows(inputs if dropped is None else dropped)
        hidden = down @ rows.T  # thin matrices lie along the rows here and below, where MKL is faster
        made = _cheaper_made(len(rows), weight, dropped)
        output = linear(inputs, torch.addmm(weight, up, down, alpha=scale) if made else weight, bias)
        if not made:
            output.view(-1, output.shape[-1]).addmm_(hidden.T, up.T, alpha=scale)
        ctx.save_for_backward(inputs, weight, down, up, hidden, dropped)
        ctx.scale, ctx.made = scale, made
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, down, up, hidden, dropped = ctx.saved_tensors
        rows, flat = _rows(inputs if dropped is None else dropped), _rows(gradient)
        if torch.is_grad_enabled():  # a graph of this pass is wanted, in which `hidden` is no constant
            hidden = down @ rows.T
        needs = ctx.needs_input_grad
        inner, of_up = up.T @ flat.T, (hidden @ flat).T if needs[4] else None
        if ctx.scale != 1:
            inner, of_up = inner * ctx.scale, None if of_up is None else of_up * ctx.scale
        of_inputs = of_dropped = None
        if needs[0]:
            of_inputs = flat @ (torch.addmm(weight, up, down, alpha=ctx.scale) if ctx.made else weight)
        if dropped is not None:
            of_dropped = (inner.T @ down).view_as(dropped) if needs[6] else None
        elif of_inputs is not None and not ctx.made:
            of_inputs = of_inputs.addmm_(inner.T, down)
        return (
            None if of_inputs is None else of_inputs.view_as(inputs),
            flat.T @ _rows(inputs) if needs[1] else None,
            flat.sum(0) if needs[2] else None,
            inner @ rows if needs[3] else None,
            of_up,
            None,
            of_dropped,
        )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])

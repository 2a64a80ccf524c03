"""A linear layer and a low-rank product beside it, which keep of their input what their gradients need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_peft.deltas.operands import operands
from lightning_peft.weights.shards import is_shard


def low_rank_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, dropped: Tensor | None = None
) -> Tensor:
    """Compute ``x W^T + b + scale (x A^T) B^T``.

    Beside the plain composition it saves passes over the output, forward, and over the gradient of the inputs: the scale and
    the sum are part of the matrix products. Where there are many rows, the sum of both weights is made for the moment of such a
    product, which is less than a pass over the rows; not in half precision, in which small deltas would be lost in it.

    The input is kept for the gradient of ``A`` alone. Where it is the result of an activation or of a product, whose operands
    autograd keeps anyway, it is made again in the backward pass; where ``A`` is frozen, nothing of it is kept.

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
    if torch._C._are_functorch_transforms_active() or is_shard(inputs):
        read = inputs if dropped is None else dropped
        up = _rows_of(weight, up) if is_shard(inputs) else up
        return linear(inputs, weight, bias) + scale * linear(linear(read, down), up)
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = [None if tensor is None else tensor.to(dtype) for tensor in (inputs, weight, bias, down, up, dropped)]
        inputs, weight, bias, down, up, dropped = cast  # type: ignore[assignment]
        with torch.autocast(device, enabled=False):
            return _low_rank_linear(inputs, weight, bias, down, up, scale, dropped)
    if down.dtype != inputs.dtype:
        down, up = down.to(inputs.dtype), up.to(inputs.dtype)
    return _low_rank_linear(inputs, weight, bias, down, up, scale, dropped)


def _low_rank_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, dropped: Tensor | None
) -> Tensor:
    read = inputs if dropped is None else dropped
    if torch.is_grad_enabled() and not (weight.requires_grad or down.requires_grad):
        output, hidden = linear(inputs, weight, bias), linear(read, down)
        return torch.addmm(_rows(output), _rows(hidden), up.T, alpha=scale).view_as(output)
    made = None if weight.requires_grad else operands(read)  # whose gradient needs the input itself
    operation, given = made or (None, ())
    return _LowRankLinear.apply(  # type: ignore[no-any-return]
        inputs, weight, bias, down, up, scale, dropped, operation, *given
    )


def _rows_of(weight: Any, up: Any) -> Tensor:
    """Give each process the rows of ``B`` for those outputs that it computes, where a layer is split by outputs."""
    from torch.distributed.tensor import Replicate

    rows = [place if place.is_shard(0) else Replicate() for place in weight.placements]
    return up.redistribute(placements=rows)  # type: ignore[no-any-return]


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
        operation: Callable[..., Tensor] | None,
        *given: Tensor,
    ) -> Tensor:
        read = inputs if dropped is None else dropped
        rows = _rows(read)
        hidden = down @ rows.T  # lies along the rows, where both products with it are faster
        made = _cheaper_made(len(rows), weight, dropped)
        output = linear(inputs, torch.addmm(weight, up, down, alpha=scale) if made else weight, bias)
        if not made:
            output.view(-1, output.shape[-1]).addmm_(hidden.T, up.T, alpha=scale)
        of_weight = inputs if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(of_weight, weight, down, up, hidden, *([read] if operation is None else given))
        ctx.scale, ctx.made, ctx.operation = scale, made, operation
        ctx.drops, ctx.shape = dropped is not None, inputs.shape
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_weight, weight, down, up, hidden, *given = ctx.saved_tensors
        flat, needs = _rows(gradient), ctx.needs_input_grad
        if torch.is_grad_enabled():  # a graph of this pass is wanted, in which `hidden` is no constant
            hidden = down @ _rows(given[0] if ctx.operation is None else ctx.operation(*given)).T
        inner, of_up = up.T @ flat.T, (hidden @ flat).T if needs[4] else None  # `inner` lies along the rows too
        if ctx.scale != 1:
            inner, of_up = inner * ctx.scale, None if of_up is None else of_up * ctx.scale
        of_inputs = of_dropped = None
        if needs[0]:
            of_inputs = flat @ (torch.addmm(weight, up, down, alpha=ctx.scale) if ctx.made else weight)
        if ctx.drops:
            of_dropped = (inner.T @ down).view(ctx.shape) if needs[6] else None
        elif of_inputs is not None and not ctx.made:
            of_inputs = of_inputs.addmm_(inner.T, down)
        return (
            None if of_inputs is None else of_inputs.view(ctx.shape),
            flat.T @ _rows(of_weight) if needs[1] else None,
            flat.sum(0) if needs[2] else None,
            _times_input(inner, ctx.operation, given) if needs[3] else None,
            of_up,
            None,
            of_dropped,
            None,
            *(None for _ in given if ctx.operation is not None),
        )


def _times_input(inner: Tensor, operation: Callable[..., Tensor] | None, given: list[Tensor]) -> Tensor:
    """``inner @ x``. An ``x`` that is made again is made in blocks of rows, which stay in the cache of a CPU."""
    if operation is None:
        return inner @ _rows(given[0])
    operands = [_rows(each) for each in torch.broadcast_tensors(*given)]  # type: ignore[no-untyped-call]
    rows, width = operands[0].shape
    block = max(_BLOCK // width, 64) if inner.device.type == "cpu" else max(rows, 1)
    product = inner.new_zeros(len(inner), width)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        product = torch.addmm(product, inner[:, part], operation(*(each[part] for each in operands)))
    return product


_BLOCK = 2**19  # numbers


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])

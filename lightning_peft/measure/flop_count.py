"""Floating point operations of whatever runs, counted from the shapes of its matrix products, convolutions and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Formula: TypeAlias = Callable[..., int]
aten = torch.ops.aten


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that run inside, forward and backward, with PyTorch's own formulas.

    ``torch.utils.flop_counter.FlopCounterMode`` does the same, but is made to be looked at rather than to sit in a training:
    it hooks every module of the process to name its counts, and a formula that does not know a shape ends the run. Here
    nothing but the arithmetic is done, and an operator whose formula fails is named in :attr:`unknown`. A formula registered
    with ``torch.utils.flop_counter.register_flop_formula`` counts here too.

    Attributes:
        total: Operations so far; a multiplication and an addition are two.
        unknown: Operators whose formula failed.

    Example:
        >>> with FlopCount() as count:
        ...     y = torch.nn.Linear(3, 5)(torch.ones(2, 3))
        >>> count.total  # 2 * 2 * 3 * 5
        60
    """

    # flex_attention is one: without this PyTorch refuses to run it here.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and add what it costs."""
        kwargs = kwargs or {}
        operator = getattr(func, "_overloadpacket", func)
        formula = _OWN.get(operator) or flop_registry.get(operator)
        if formula is None:
            # Without autograd, as in a teacher's pass, composite operators arrive whole and hide their products.
            if torch.is_inference_mode_enabled() and hasattr(func, "decompose"):
                with self:
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        try:
            self.total += int(formula(*args, **kwargs, out_val=output))
        except Exception:  # a count must not end a training
            self.unknown.add(str(operator))
        return output


def convolution_backward_flops(
    gradient: Tensor, inputs: Tensor, weight: Tensor, *settings: Any, out_val: Sequence[Tensor | None], **_: Any
) -> int:
    """Each gradient of a convolution costs what the convolution does; PyTorch forgets the groups of one of them."""
    transposed: bool = settings[4]
    places: Sequence[int] = inputs.shape[2:] if transposed else gradient.shape[2:]
    forward: int = 2 * inputs.shape[0] * math.prod(places) * weight.numel()
    return forward * sum(wanted is not None for wanted in out_val[:2])


def recurrent_flops(inputs: Tensor, *weights: Any, **_: Any) -> int:
    """Count the matrix products of all layers of a recurrent kernel, which see every sample at every step."""
    tensors = weights[0] if isinstance(weights[0], (list, tuple)) else weights[:4]
    return 2 * math.prod(inputs.shape[:-1]) * sum(int(tensor.numel()) for tensor in tensors if tensor.ndim == 2)


def recurrent_backward_flops(inputs: Tensor, *weights: Any, **kwargs: Any) -> int:
    """Count the two products that each product of the forward pass has in the backward pass."""
    return 2 * recurrent_flops(inputs, *weights, **kwargs)


# Where PyTorch has no formula, or one that is off by the number of groups.
_OWN: dict[Any, Formula] = {
    aten.convolution_backward: convolution_backward_flops,
    aten.mkldnn_rnn_layer: recurrent_flops,
    aten.mkldnn_rnn_layer_backward: recurrent_backward_flops,
    aten._cudnn_rnn: recurrent_flops,
    aten._cudnn_rnn_backward: recurrent_backward_flops,
}

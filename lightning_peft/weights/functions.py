"""Functions with gradients of their own that cost little in a training step and can still be transformed by ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def transformed() -> bool:
    """Whether a call is traced by a compiler or transformed by ``torch.func``: what it makes means nothing outside."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def in_backward() -> bool:
    """Whether autograd walks back now, in which activation checkpointing repeats calls; a compiler traces none of that."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def as_type(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in some type: itself where it has it, which a look tells in a tenth of the time of ``value.to``."""
    return value if value.dtype is dtype else value.to(dtype)


def quick(function: type[Function]) -> Callable[..., Any]:
    """Return ``function.apply``, faster where nobody transforms it.

    ``vmap``, ``grad`` and the like need a ``setup_context`` apart from ``forward``, and calling the two apart costs some 80
    microseconds a call, as much as a small layer's step.

    Args:
        function: A class with ``forward(*inputs)``, ``setup_context(ctx, inputs, output)`` and ``backward``.

    Example:
        >>> class Double(Function):
        ...     forward = staticmethod(lambda x: 2 * x)
        ...     setup_context = staticmethod(lambda ctx, inputs, output: None)
        ...     backward = staticmethod(lambda ctx, grad: 2 * grad)
        >>> x = torch.ones(2, requires_grad=True)
        >>> quick(Double)(x).sum().backward()
        >>> x.grad
        tensor([2., 2.])
    """

    class Quick(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            output: Tensor = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

        backward = function.backward

    Quick.__name__ = function.__name__

    def apply(*inputs: Any) -> Any:
        return (function if transformed() else Quick).apply(*inputs)

    return apply

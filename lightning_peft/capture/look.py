"""Tensors of a running network, shown to Python: also of a compiled one, without its compiler looking into that Python."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_KEYS = itertools.count()
_LOOKS: weakref.WeakValueDictionary[int, Look] = weakref.WeakValueDictionary()


class Look:
    """Shows tensors to a function.

    Where a network is compiled, the function is not: traced, it would be compiled anew for every number that it counts, or
    break the graph. It runs behind an operator, on the tensors of every call.

    Args:
        see: Called with the tensors, which are detached in a compiled network; it changes none of them.

    Example:
        >>> seen = []
        >>> look = Look(lambda tensor: seen.append(tensor.sum().item()))
        >>> double = torch.compile(lambda tensor: look(tensor) or 2 * tensor, backend="eager", fullgraph=True)
        >>> _ = double(torch.ones(2)), double(torch.ones(2))
        >>> seen
        [2.0, 2.0]
    """

    def __init__(self, see: Callable[..., Any]) -> None:
        self.see = see
        with torch.inference_mode(False):
            self._mark = torch.zeros((), device="cpu")
        self._key = next(_KEYS)
        _LOOKS[self._key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Look, (self.see,)  # copies show to copies, under a key of their own

    def __call__(self, *values: Any) -> None:
        """Show tensors; anything else among them is left to the compiler."""
        if torch.compiler.is_compiling() and all(isinstance(value, Tensor) for value in values):
            _look(self._mark, [value.detach() for value in values], self._key)
        else:
            self.see(*values)


# What changes no tensor and returns none would be left out by compilers: it is said to change a mark.
@torch.library.custom_op("lightning_peft::look", mutates_args=("mark",))
def _look(mark: Tensor, tensors: Sequence[Tensor], key: int) -> None:
    look = _LOOKS.get(key)
    if look is not None:
        look.see(*tensors)


@_look.register_fake
def _(mark: Tensor, tensors: Sequence[Tensor], key: int) -> None:
    return None


class GradientLook:
    """Shows the gradient of a tensor to a function, in a compiled network too.

    Args:
        see: Called with the gradient and further tensors.

    Example:
        >>> seen, x = [], torch.ones(2, requires_grad=True)
        >>> look = GradientLook(lambda gradient, beside: seen.append((gradient + beside).tolist()))
        >>> triple = torch.compile(lambda x: 3 * look(2 * x, x), backend="eager", fullgraph=True)
        >>> triple(x).sum().backward()
        >>> seen, x.grad
        ([[4.0, 4.0]], tensor([6., 6.]))
    """

    def __init__(self, see: Callable[..., Any]) -> None:
        self.see = see
        self._key = next(_KEYS)
        _GRADIENT_LOOKS[self._key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return GradientLook, (self.see,)

    def __call__(self, tensor: Tensor, *beside: Tensor) -> Tensor:
        """Return the tensor, to be used in its place.

        Args:
            tensor: The tensor whose gradient is wanted; one without is returned as it is.
            *beside: Tensors shown with it.
        """
        if not tensor.requires_grad:
            return tensor
        detached = [each.detach() for each in beside]
        if torch.compiler.is_compiling():
            return _with_gradient(tensor, detached, self._key)  # type: ignore[no-any-return]
        tensor.register_hook(lambda gradient: self.see(gradient, *detached))  # type: ignore[no-untyped-call]
        return tensor


_GRADIENT_LOOKS: weakref.WeakValueDictionary[int, GradientLook] = weakref.WeakValueDictionary()


@torch.library.custom_op("lightning_peft::with_gradient", mutates_args=())
def _with_gradient(tensor: Tensor, beside: Sequence[Tensor], key: int) -> Tensor:
    return tensor.clone()


@torch.library.custom_op("lightning_peft::see_gradient", mutates_args=())
def _see_gradient(gradient: Tensor, beside: Sequence[Tensor], key: int) -> Tensor:
    look = _GRADIENT_LOOKS.get(key)
    if look is not None:
        look.see(gradient, *beside)
    return gradient.clone()


@_with_gradient.register_fake
@_see_gradient.register_fake
def _(tensor: Tensor, beside: Sequence[Tensor], key: int) -> Tensor:
    return tensor.clone()


def _keep(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])
    ctx.key = inputs[2]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[None], None]:
    beside = list(ctx.saved_tensors)
    return _see_gradient(gradient, beside, ctx.key), [None] * len(beside), None


_with_gradient.register_autograd(_backward, setup_context=_keep)

"""Whether a call may look at the values of its tensors, which choosing channels takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C import _functorch, _TorchDispatchModeKey
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (Tensor, nn.Parameter)
_RECORDER = _TorchDispatchModeKey.PROXY


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is PyTorch's own, not one of a class that sees operators or holds something else."""
    return type(tensor) in _PLAIN


def readable(tensor: Tensor) -> bool:
    """Whether Python may decide by a tensor's values.

    Not under ``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``vmap`` and the like, which record one course for all
    values, and not where there are none, as on the device ``meta``.
    """
    return (
        not torch.compiler.is_compiling()
        and is_plain(tensor)
        and not tensor.is_meta
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and _functorch.peek_interpreter_stack() is None
        and torch._C._get_dispatch_mode(_RECORDER) is None
    )


def unobserved(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody must see the operators that compute on tensors: no autograd, autocast or dispatch mode."""
    return (
        not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
        and _get_current_dispatch_mode() is None
        and forward_ad._current_level < 0
    )

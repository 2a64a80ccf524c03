"""What an input was made of: kept by the step before anyway, so that a layer can make its input again and need not keep it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

Made = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""An operation without state, and its operands."""


def operands(tensor: Tensor) -> Made | None:
    """Find the operation that made a tensor, if it costs one pass to repeat and autograd keeps all it was made of.

    That holds for GELU, for SiLU, and for a product, as in gated feed-forward layers. Their inputs are the widest that a
    transformer keeps.

    Args:
        tensor: Any tensor.

    Returns:
        The operation and its operands; ``None`` for a tensor to keep as it is. That is so under ``torch.compile``, whose
        partitioner chooses by itself, and under hooks on saved tensors, as in activation checkpointing, which keep things in
        places that we do not know.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> operation, given = operands(torch.nn.functional.gelu(x, approximate="tanh"))
        >>> operation.keywords, given
        ({'approximate': 'tanh'}, (tensor([1., 1.], requires_grad=True),))
        >>> operands(x + 1) is None
        True
    """
    if torch.compiler.is_compiling() or tensor.grad_fn is None or _hooked():
        return None
    node: Any = tensor.grad_fn
    kind = node.name()
    try:
        if kind == "GeluBackward0":
            return partial(gelu, approximate=node._saved_approximate), (node._saved_self,)
        if kind == "SiluBackward0":
            return silu, (node._saved_self,)
        if kind == "MulBackward0" and node._saved_self is not None and node._saved_other is not None:
            return torch.mul, (node._saved_self, node._saved_other)
    except RuntimeError:  # let go of after a backward pass, or changed in place
        pass
    return None


def _hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

"""Whether somebody compiles a network."""

from __future__ import annotations

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, or one inside it, is compiled.

    Example:
        >>> import torch
        >>> is_compiled(nn.Sequential(nn.Linear(2, 2))), is_compiled(nn.Sequential(torch.compile(nn.Linear(2, 2))))
        (False, True)
    """
    if getattr(module, "_compiler_ctx", None) is not None:  # Lightning's record of torch.compile(module)
        return True
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in module.modules())

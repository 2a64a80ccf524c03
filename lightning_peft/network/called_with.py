"""Calling a module with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with some of its parameters and buffers replaced, and give it its own back.

    Unlike ``torch.func.functional_call`` this also gives back the tensors of a layer that is registered under several names,
    which that leaves replaced (it exchanges them once for each name).

    Args:
        module: The module.
        tensors: By qualified name; a tensor that is shared follows under its other names.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> import torch
        >>> norm = nn.LayerNorm(2)
        >>> net = nn.ModuleDict({"first": norm, "second": norm})
        >>> net.forward = lambda x: net["second"](x)
        >>> before = norm.weight
        >>> call_with(net, {"first.weight": torch.tensor([2.0, 0.0])}, (torch.tensor([[-1.0, 1.0]]),), {}).round()
        tensor([[-2., 0.]], grad_fn=<RoundBackward0>)
        >>> norm.weight is before
        True
    """
    named = dict(_slots(module))
    others: dict[int, list[str]] = {}
    for name, tensor in named.items():
        others.setdefault(id(tensor), []).append(name)
    every = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    # Tensors of layer parts are not among those of a module that is no whole one; they have one name.
    replaced = {
        slot: tensor for name, tensor in tensors.items() for slot in (others[id(every[name])] if name in every else [name])
    }
    return functional_call(module, replaced, args, kwargs, tie_weights=False)


def _slots(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every place that holds a tensor, once, by a name that leads there."""
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, part in module.named_modules()
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    ]

"""A baked copy of a module's network, in evaluation mode, without Lightning around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.baking.bake import bake
from lightning_peft.namespaces import both
from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.network.resolve import resolve_network

Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""Arguments of a network's call: a tensor, positional arguments (tuple), or keyword arguments (mapping)."""


def plain_network(module: nn.Module, network: str | None = None) -> nn.Module:
    """Copy the network of a module for use outside of training; the module is left as it is.

    Args:
        module: A LightningModule or a network, in training, trained or baked.
        network: Qualified name of the network when a LightningModule has several candidates.

    Returns:
        The copy: baked, in evaluation mode, without gradients.

    Raises:
        MisconfigurationException: The network cannot be told.
    """
    if isinstance(module, both(LightningModule)) or network is not None:
        _, module = resolve_network(module, network)
    plain: nn.Module = bake(deep_copy(module)).eval()
    return plain.requires_grad_(False)


def builtin_output(output: Any) -> Any:
    """Return what a network gives back in tuples, lists and dicts, which any process can read.

    Example:
        >>> from collections import OrderedDict
        >>> builtin_output(OrderedDict(logits=1, states=(2, None)))
        {'logits': 1, 'states': (2, None)}
    """
    if isinstance(output, Mapping):
        return {key: builtin_output(value) for key, value in output.items()}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {item.name: builtin_output(getattr(output, item.name)) for item in dataclasses.fields(output)}
    if isinstance(output, (tuple, list)):
        return (list if isinstance(output, list) else tuple)(map(builtin_output, output))
    return output


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into positional and keyword arguments.

    Example:
        >>> arguments({"input_ids": 1}), arguments((1, 2))
        (((), {'input_ids': 1}), ((1, 2), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def call(network: nn.Module, inputs: Inputs) -> Any:
    """Run a network on inputs."""
    args, kwargs = arguments(inputs)
    return network(*args, **kwargs)


def batch_size(inputs: Inputs) -> int:
    """Return the length of the first tensor of inputs, which counts as their batch size.

    Raises:
        MisconfigurationException: There is no tensor with a batch dimension.
    """
    args, kwargs = arguments(inputs)
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise MisconfigurationException(
        "The example inputs hold no tensor with a batch dimension. Pass a tensor, a tuple of positional arguments or a mapping "
        "of keyword arguments, as the network is called with."
    )


def has_batch(value: Any, size: int) -> bool:
    """Whether an argument runs over the batch: a tensor as long as the first one."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


def with_batch_size(inputs: Inputs, size: int) -> Inputs:
    """Repeat or cut the samples of inputs so that there are ``size``; arguments that do not run over the batch stay.

    Example:
        >>> import torch
        >>> with_batch_size((torch.tensor([1, 2]), 3), 3)
        (tensor([1, 2, 1]), 3)
    """
    now = batch_size(inputs)

    def resized(value: Any) -> Any:
        if not has_batch(value, now):
            return value
        return value.repeat(-(-size // now), *[1] * (value.ndim - 1))[:size]

    return changed(inputs, resized)


def changed(inputs: Inputs, function: Any) -> Inputs:
    """Apply a function to every argument, and keep how they are passed."""
    args, kwargs = arguments(inputs)
    if kwargs:
        return {name: function(value) for name, value in kwargs.items()}
    return function(inputs) if isinstance(inputs, Tensor) else tuple(function(value) for value in args)

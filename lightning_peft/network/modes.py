"""Training and evaluation mode of a module's parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(module: nn.Module, *, evaluate: bool = True) -> Iterator[None]:
    """Give every part of a module back the mode it had; parts that were frozen in another one keep it.

    Args:
        module: The module.
        evaluate: Whether it is in evaluation mode meanwhile.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with modes_kept(net):
        ...     print(net.training)
        False
        >>> [part.training for part in net]
        [True, False]
    """
    modes = {part: part.training for layer in module.modules() for part in _with_parts(layer)}
    if evaluate:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _with_parts(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer, and what stands beside it: only the module that parts were attached to counts them among its own."""
    yield layer
    for part in getattr(layer, "part_stack", None) or ():
        yield from part.modules()

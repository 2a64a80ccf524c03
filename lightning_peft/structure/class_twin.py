"""What a network's own class builds from a configuration: a twin without values, to compare an edited network with.

A class can give a block what depends on its position (a window, a rate, a kind of attention), and only the class knows what.
So it is asked: it builds the network once from the configuration as it is and once from the configuration after the edit.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_peft.network.plain_class import plain_class


def class_twin(network: nn.Module, config: Any, *, buffers: bool = False) -> nn.Module | None:
    """Let a network's class build it from a configuration; ``None`` when that fails.

    Args:
        network: The network.
        config: The configuration; the class gets a copy.
        buffers: Whether buffers shall have values; parameters never do.
    """
    where = _buffers_only() if buffers else torch.device("meta")
    with isolate_rng(include_cuda=False), warnings.catch_warnings(), _quiet(), where:
        warnings.simplefilter("ignore")
        try:
            twin = plain_class(network)(fresh(config))
        except Exception:  # a class may refuse a configuration with any error
            return None
    return twin if isinstance(twin, nn.Module) else None


def fresh(config: Any) -> Any:
    """Return a copy of a configuration as it would be read back from its file, where it has one.

    Example:
        >>> from types import SimpleNamespace
        >>> fresh(SimpleNamespace(n_layer=2))
        namespace(n_layer=2)
    """
    if hasattr(config, "to_dict") and hasattr(type(config), "from_dict"):
        return type(config).from_dict(copy.deepcopy(config.to_dict()))
    return copy.deepcopy(config)


def rebuilt(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the networks around ``path`` that may be built from their configuration, with their names, the outermost first."""
    parts = path.split(".")
    for length in range(len(parts)):
        name = ".".join(parts[:length])
        owner = module.get_submodule(name)
        # A LightningModule is left alone: its constructor may read files.
        if vars(owner).get("config") is not None and not isinstance(owner, LightningModule):
            yield name, owner


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what a class says of a configuration that is only tried."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _buffers_only() -> Iterator[None]:
    """Let parameters lose their memory as soon as a layer has them, so that only one at a time takes any."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]

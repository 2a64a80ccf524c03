"""Running a user's code a second time for the same step, so that nothing but its result is left of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric

from lightning_peft.capture.shim import Shim
from lightning_peft.network.plain_tensors import overwrite


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Within it a module logs nothing."""
    shims = [Shim(module, name, lambda inner, *args, **kwargs: None).install() for name in ("log", "log_dict")]
    try:
        yield
    finally:
        for shim in reversed(shims):
            shim.remove()


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Give buffers (the running statistics of batch norm among them) back what they held, in place.

    A backward pass belongs within it too: autograd notices when a buffer that it saved is written.
    """
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            overwrite(buffer, value)


@contextmanager
def metrics_kept(module: nn.Module) -> Iterator[None]:
    """Give the metrics among a module's parts (torchmetrics) back what they had counted."""
    before = [(part, _counted(part)) for part in module.modules() if isinstance(part, Metric)]
    try:
        yield
    finally:
        for metric, state in before:
            vars(metric).update(state)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Give the numbers, lists and dicts that a module itself holds back what they held: losses of an epoch, counters."""
    plain = (int, float, bool, list, dict, set)
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and type(value) in plain}
    before = [(name, value, copy.copy(value)) for name, value in own.items()]
    try:
        yield
    finally:
        for name, value, kept in before:
            if isinstance(value, list):
                value[:] = kept
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(kept)
            vars(module)[name] = value


def _counted(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    # Most metrics add to their tensors and lists in place.
    return {name: _copied(vars(metric)[name]) for name in names if name in vars(metric)}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value


class RandomState:
    """Where the global generators of torch, NumPy and Python stand, so that dropout and mixing draw the same once more."""

    def __init__(self) -> None:
        self._states = _collect_rng_states(include_cuda=torch.cuda.is_available())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from there, and go on afterwards from where the generators stand now."""
        now = RandomState()
        _set_rng_states(self._states)
        try:
            yield
        finally:
            _set_rng_states(now._states)

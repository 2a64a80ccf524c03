"""Checkpoints of sharded modules as files of whole tensors, from which any number of processes goes on.

Lightning's own way finds parameters by walking over the module's children, where those of maps and parts are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_peft.capture.shim import Shim
from lightning_peft.weights.detach import attachments
from lightning_peft.weights.shards import read_whole, spread_as, whole


class WholeFiles:
    """Stands in front of what a strategy does to save and load in the course of a fit.

    Args:
        trainer: The Trainer that fits.
        module: Its module, with shards for parameters.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module

    def shims(self) -> Iterator[Shim]:
        """What is to stand in front of the strategy's methods."""
        for name in (
            "lightning_module_state_dict",
            "optimizer_state",
            "load_checkpoint",
            "load_model_state_dict",
        ):
            yield Shim(self._trainer.strategy, name, getattr(self, name))

    def lightning_module_state_dict(self, inner: Callable[..., Any]) -> dict[str, Any]:
        """Return the module's tensors, whole, in the first process, and none elsewhere."""
        return self._first({name: self._on_cpu(tensor) for name, tensor in self._module.state_dict().items()})

    def optimizer_state(self, inner: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state, likewise, as that of an optimizer without shards."""
        own: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        return self._first(tree_map(self._on_cpu, own.state_dict()))

    def _on_cpu(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        full = whole(value.detach())
        return full.cpu() if self._trainer.is_global_zero else None

    def _first(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self._trainer.is_global_zero else {}

    def load_checkpoint(self, inner: Callable[..., Any], path: Any, weights_only: bool | None = None) -> Any:
        """Read a file in every process; nothing is loaded yet."""
        return torch.load(self._trainer.strategy.broadcast(path), map_location="cpu", mmap=True, weights_only=weights_only)

    def load_model_state_dict(self, inner: Callable[..., Any], checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole tensors into shards, of optimizers too: the strategy tells Lightning that it does."""
        own = self._module.state_dict()
        state = {name: spread_as(own.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self._module.load_state_dict(state, strict=strict)
        for optimizer, state in zip(self._trainer.strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            held = {
                place: {name: _spread(parameters[place], value) for name, value in values.items()}
                for place, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": held})

    def save(self, save: Callable[..., Any], inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Have a checkpoint completed where its tensors are, with everything on the module at hand whole."""
        with torch.no_grad(), read_whole(*attachments(self._module)):
            if self._trainer.is_global_zero:
                save(inner, checkpoint)
            else:
                inner(checkpoint)


def _spread(parameter: nn.Parameter, value: Any) -> Any:
    alike = isinstance(value, Tensor) and value.shape == parameter.shape  # not the number of its steps
    return spread_as(parameter, value) if alike else value

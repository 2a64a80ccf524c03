"""Checkpoints of sharded modules, as files of whole tensors or as folders of shards; any number of processes goes on from both.

Lightning's own way finds parameters by walking over the module's children, where those of maps and parts are not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_peft.atomic_files import replaced_folder
from lightning_peft.capture.shim import Shim
from lightning_peft.optim.optimizers import named_groups
from lightning_peft.structure import shard_folder
from lightning_peft.structure.plain_state import with_versions
from lightning_peft.weights.detach import attachments
from lightning_peft.weights.shards import empty_shards, is_shard, read_whole, spread_as, whole


def files_of(trainer: Trainer, module: LightningModule) -> WholeFiles:
    """Return what saves and loads a sharded module as the strategy was told to; arguments as of :class:`WholeFiles`."""
    return (ShardFolders if trainer.strategy._save_distributed_checkpoint else WholeFiles)(trainer, module)  # type: ignore[attr-defined]


def read_folders(inner: Callable[..., Any], path: Any, weights_only: bool | None = None) -> Any:
    """Read a checkpoint in a fit without shards: a folder of them is read whole."""
    if shard_folder.is_shard_folder(path):
        return shard_folder.read(path, trusted=weights_only is False)
    return inner(path, weights_only=weights_only)


class WholeFiles:
    """Stands in front of what a strategy does to save and load in the course of a fit.

    Args:
        trainer: The Trainer that fits.
        module: Its module, with shards for parameters.
    """

    shadowed: tuple[str, ...] = (
        "lightning_module_state_dict",
        "optimizer_state",
        "load_checkpoint",
        "load_model_state_dict",
    )

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module

    def shims(self) -> Iterator[Shim]:
        """What is to stand in front of the strategy's methods."""
        for name in self.shadowed:
            yield Shim(self._trainer.strategy, name, getattr(self, name))

    def lightning_module_state_dict(self, inner: Callable[..., Any]) -> dict[str, Any]:
        """Return the module's tensors, whole, in the first process, and none elsewhere."""
        return self._first(self._tensors(self._on_cpu))

    def optimizer_state(self, inner: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state, likewise, as that of an optimizer without shards."""
        return self._first(tree_map(self._on_cpu, _unwrapped(optimizer).state_dict()))

    def _tensors(self, made: Callable[[Any], Any]) -> dict[str, Any]:
        """Return what is made of the module's tensors; of one with several names the same under all of them."""
        found = self._module.state_dict(keep_vars=True)
        once = {id(value): made(value) for value in found.values()}
        return with_versions({name: once[id(value)] for name, value in found.items()}, found)

    def _on_cpu(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        full = whole(value.detach())
        return full.cpu() if self._trainer.is_global_zero else None

    def _unspread(self, value: Any) -> Any:
        return self._on_cpu(value) if is_shard(value) else value

    def _first(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self._trainer.is_global_zero else {}

    def load_checkpoint(self, inner: Callable[..., Any], path: Any, weights_only: bool | None = None) -> Any:
        """Read a file in every process, or a folder's shards; nothing is loaded yet."""
        path = self._trainer.strategy.broadcast(path)
        if shard_folder.is_shard_folder(path):
            return shard_folder.read(path, empty_shards(self._module), trusted=weights_only is False)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)

    def load_model_state_dict(self, inner: Callable[..., Any], checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load tensors into shards, of optimizers too: the strategy tells Lightning that it does."""
        own = self._module.state_dict()
        state = {name: spread_as(own.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self._module.load_state_dict(state, strict=strict)
        for optimizer, state in zip(self._trainer.strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
            saved = itertools.chain.from_iterable(group["params"] for group in state["param_groups"])
            owners = dict(zip(saved, parameters, strict=False))
            held = {
                key: {name: _spread(owners[key], value) for name, value in values.items()}
                for key, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": held})

    def save(self, save: Callable[..., Any], inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Have a checkpoint completed where its tensors are, with everything on the module at hand whole."""
        with torch.no_grad(), read_whole(*attachments(self._module)):
            if "callbacks" in checkpoint:
                checkpoint["callbacks"] = tree_map(self._unspread, checkpoint["callbacks"])
            if self._trainer.is_global_zero:
                save(inner, checkpoint)
            else:
                inner(checkpoint)


class ShardFolders(WholeFiles):
    """Saves the same as a folder to which every process writes its shards; no process holds more than one tensor whole."""

    shadowed = (*WholeFiles.shadowed, "save_checkpoint")

    def lightning_module_state_dict(self, inner: Callable[..., Any]) -> dict[str, Any]:
        """Return the module's tensors as they are."""
        return self._tensors(lambda value: value.detach() if isinstance(value, Tensor) else value)

    def optimizer_state(self, inner: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state as it is, by names of parameters, as folders of shards hold it."""
        own = _unwrapped(optimizer)
        state, names = own.state_dict(), named_groups(self._module, own)
        groups = [{**group, "params": listed} for group, listed in zip(state["param_groups"], names, strict=True)]
        every = list(itertools.chain.from_iterable(names))
        return {"state": {every[place]: held for place, held in state["state"].items()}, "param_groups": groups}

    def save(self, save: Callable[..., Any], inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Have a checkpoint completed in every process, one tensor after the other."""
        with torch.no_grad():
            save(inner, checkpoint)

    def save_checkpoint(
        self, inner: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a folder beside the one that may stand there, and put it in its place when it is whole."""
        strategy = self._trainer.strategy
        first = self._trainer.is_global_zero
        with replaced_folder(Path(filepath)) if first else contextlib.nullcontext() as mine:
            folder: Any = strategy.broadcast(mine)
            rest = shard_folder.write(checkpoint, folder)
            if first:
                torch.save(rest, folder / shard_folder.REST)
        strategy.barrier()


def _unwrapped(optimizer: Any) -> Optimizer:
    own: Optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
    return own


def _spread(parameter: nn.Parameter, value: Any) -> Any:
    alike = isinstance(value, Tensor) and value.shape == parameter.shape  # not the number of its steps
    return spread_as(parameter, value) if alike else value

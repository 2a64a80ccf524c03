"""Attaching methods to modules that ``fully_shard`` spreads over processes in ``configure_model``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.weights.sharded_view import shown_to_sharding
from lightning_peft.weights.shards import is_shard

_LINE = "call lightning_peft.attach(self) in configure_model, when the network is whole and before fully_shard(...)"


def check_layout(strategy: Any) -> None:
    """Refuse a fit whose weights would be split within layers.

    Args:
        strategy: A ``ModelParallelStrategy``, of a Trainer that may not have begun.

    Raises:
        MisconfigurationException: It is told to do so, or does by default.
    """
    ranks = strategy._tensor_parallel_size
    if ranks == "auto":  # what the strategy makes of it when it begins
        ranks = strategy.num_processes
    if ranks > 1:
        raise MisconfigurationException(
            f"{type(strategy).__name__} gives every layer to {ranks} processes (tensor_parallel_size={ranks}, which is all of "
            "a machine's by default), and methods act on layers. Shard without that: ModelParallelStrategy("
            f"data_parallel_size={strategy.world_size}, tensor_parallel_size=1)."
        )


def configure(module: LightningModule, inner: Callable[[], None], attach: Callable[[], None]) -> None:
    """Run a module's ``configure_model`` with the methods attached before it shards.

    Args:
        module: The module.
        inner: Its ``configure_model``, which may attach them itself.
        attach: Attaches the methods.

    Raises:
        MisconfigurationException: The module is sharded already, or ``configure_model`` made layers and sharded them before
            the methods were attached.
    """
    kind = type(module).__name__
    if _sharded(module):
        raise MisconfigurationException(
            f"{kind} is sharded already, and methods go on before that. Build the module anew, load into it what was saved "
            "after the last fit, and fit that."
        )
    if any(True for _ in module.parameters()):
        attach()
    before = {name for name, _ in module.named_parameters()}
    with shown_to_sharding():
        inner()
    made = [name for name, _ in module.named_parameters() if name not in before]
    if before and made:
        raise MisconfigurationException(
            f"configure_model of {kind} made {made[0]} after the methods were attached to what __init__ had made. Make the "
            f"whole network in __init__, and only shard it in configure_model; or make all of it there and {_LINE}."
        )


def check_whole(module: LightningModule) -> None:
    """Refuse to attach methods to a sharded module.

    Raises:
        MisconfigurationException: It is one.
    """
    if _sharded(module):
        raise MisconfigurationException(
            f"configure_model of {type(module).__name__} shards layers that no method was attached to. Make the network in "
            f"__init__, or {_LINE}."
        )


def reshard(module: nn.Module) -> None:
    """Let groups that a pass without a backward one has left whole be shards again: what is written to whole ones is lost."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def forget_taken_off(trainer: Trainer, module: LightningModule) -> None:
    """Let optimizers forget parameters that are on the module no more; checkpoints of shards name every one they hold."""
    present = set(module.parameters())
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in present:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if parameter in present]


def _sharded(module: nn.Module) -> bool:
    return any(is_shard(parameter) for parameter in module.parameters())

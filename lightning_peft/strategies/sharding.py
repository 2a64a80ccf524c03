"""Attaching methods to modules that ``fully_shard`` spreads over processes in ``configure_model``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_peft.contract import Contract
from lightning_peft.weights.sharded_view import shown_to_sharding
from lightning_peft.weights.shards import is_shard

_LINE = "call lightning_peft.attach(self) in configure_model, when the network is whole and before fully_shard(...)"


def check_layout(strategy: Any, methods: Iterable[Contract], *, may_split: bool = True) -> None:
    """Refuse a fit whose weights would be split within layers, where a method acts on whole ones.

    Args:
        strategy: A ``ModelParallelStrategy``, of a Trainer that may not have begun.
        methods: The methods.
        may_split: Whether whoever trains them splits layers at all.

    Raises:
        MisconfigurationException: The strategy is told to split, or does by default, and such a method is among them.
    """
    ranks = strategy._tensor_parallel_size
    if ranks == "auto":  # what the strategy makes of it when it begins
        ranks = strategy.num_processes
    whole = [method.name for method in methods if "tensor-parallel" not in method.strategies]
    if ranks > 1 and (whole or not may_split):
        reason = f"{whole[0]} acts on whole layers" if whole else "this command trains whole layers"
        raise _not_split(strategy.world_size, ranks, reason)


def _not_split(world_size: int, ranks: int, reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"ModelParallelStrategy gives every layer to {ranks} processes (tensor_parallel_size={ranks}, which is all of a "
        f"machine's by default), and {reason}. Shard without that: ModelParallelStrategy(data_parallel_size={world_size}, "
        "tensor_parallel_size=1)."
    )


def configure(module: LightningModule, inner: Callable[[], None], attach: Callable[[], None]) -> None:
    """Run a module's ``configure_model`` with the methods attached before it shards.

    Args:
        module: The module.
        inner: Its ``configure_model``, which may attach them itself.
        attach: Attaches the methods.

    Raises:
        MisconfigurationException: The module is sharded already; ``configure_model`` made layers and sharded them before the
            methods were attached; or it splits no layer where the strategy means it to.
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
    mesh: Any = module.device_mesh
    ranks = mesh["tensor_parallel"].size()
    if ranks > 1 and not any("tensor_parallel" in names for names in map(_dimensions, module.parameters())):
        raise _not_split(mesh.size(), ranks, f"configure_model of {kind} splits none with parallelize_module")


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


def settle_gradients(optimizer: Optimizer) -> None:
    """Spread gradients as their parameters are.

    Of what every process has whole beside its part of a layer, torch leaves them as terms of a sum, or in parts. Optimizers
    would keep a momentum of that, which no folder of shards takes, and clipping by value would not be of the sum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if is_shard(parameter.grad) and parameter.grad.placements != parameter.placements:
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def forget_taken_off(trainer: Trainer, module: LightningModule) -> None:
    """Let optimizers forget parameters that are on the module no more; checkpoints of shards name every one they hold."""
    present = set(module.parameters())
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in present:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if parameter in present]


def _dimensions(parameter: Any) -> tuple[str, ...]:
    return (parameter.device_mesh.mesh_dim_names or ()) if is_shard(parameter) else ()


def _sharded(module: nn.Module) -> bool:
    return any(is_shard(parameter) for parameter in module.parameters())

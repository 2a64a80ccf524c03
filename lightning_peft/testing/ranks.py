"""Runs of a tester in each of two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft.method import Method
from lightning_peft.testing.ddp import load_module
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.shards import whole


def train_on_rank(source: str, module: str, tester: str) -> list[Any]:
    """Train every configuration of a tester as one rank of a group, after a module without methods."""
    owner = _owner(source, module, tester)
    style = owner.adapted(Plain)
    found = [_trained_on_rank([], style)] + [_trained_on_rank([factory()], style) for factory in owner.methods]
    for factory, result in zip(owner.methods, found[1:], strict=True):
        if "fsdp2" in factory().strategies:
            result |= trained_in_shards(factory, style)
    return found


def adapt_on_rank(source: str, module: str, tester: str) -> list[Any]:
    """Test a module with every configuration of a tester as one rank of a group."""
    from lightning_peft.testing.adaptation import answers, built  # which needs pytest

    found: list[Any] = []
    owner = _owner(source, module, tester)
    for factory in owner.methods:
        tested = built(owner.styles[0])
        before = copy.deepcopy(tested.state_dict())
        try:
            logits = answers(tested, [factory()], devices=2, strategy="ddp")
        except MisconfigurationException as error:
            found.append(str(error))
        else:
            found.append({"answers": logits, "changed": difference(dict(before), dict(tested.state_dict()))})
    return found


def _owner(source: str, module: str, tester: str) -> Any:
    """The tester, found in its file again."""
    try:
        owner: Any = load_module(module)
    except ImportError:
        owner = load_module(source)
    for part in tester.split("."):
        owner = getattr(owner, part)
    return owner


def _trained_on_rank(methods: list[Method], style: type[Plain]) -> dict[str, Any]:
    if any("ddp" not in method.strategies for method in methods):
        return {}
    run = fit(methods, style=style, devices=2, strategy="ddp", max_epochs=2)
    return {"weights": dict(run.module.state_dict()), "trace": trace(run.module)}


def trained_in_shards(factory: Callable[[], Method], style: type[Plain]) -> dict[str, Any]:
    """Train in double precision as a rank of two that share the parameters, and alone on the batches of both.

    Returns:
        The weights, whole, of ``"shards"`` and ``"alone"``.
    """

    def build(module: Any) -> None:
        style.build(module)
        module.double()

    def base_loss(module: Any, batch: Any) -> Any:
        return style.base_loss(module, [batch[0].double(), *batch[1:]])

    names = {"build": build, "base_loss": base_loss}
    alone, shards = type("Alone", (style,), names), type("Shards", (style,), names | {"configure_model": _shard})
    samples: Any = loader(64).dataset
    sampler = DistributedSampler(samples, 2, dist.get_rank(), shuffle=False)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    of_rank = DataLoader(samples, 4, sampler=sampler)
    spread = fit(
        [factory()], style=shards, data=of_rank, devices=2, strategy=strategy, use_distributed_sampler=False, max_epochs=2
    )
    single = fit([factory()], style=alone, data=loader(64), max_epochs=2)
    return {
        "shards": {name: whole(tensor) for name, tensor in spread.module.state_dict().items()},
        "alone": dict(single.module.state_dict()),
    }


def _shard(module: Any) -> None:
    """The usual ``configure_model``: blocks by themselves, and what is left with the whole."""
    mesh = module.device_mesh["data_parallel"]
    for child in [child for child in module.children() if any(True for _ in child.parameters())]:
        within = [layer for layer in child.modules() if layer is not child and layer._parameters]
        for layer in (*within, child):
            fully_shard(layer, mesh=mesh)

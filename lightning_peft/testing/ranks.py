"""Runs of a tester in each of two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft.baking.reading import read_checkpoint
from lightning_peft.method import Method
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.ddp import load_module
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import fit, resumable
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.shards import is_shard, whole


def train_on_rank(source: str, module: str, tester: str) -> list[Any]:
    """Train every configuration of a tester as one rank of a group, after a module without methods."""
    owner = _owner(source, module, tester)
    style = owner.adapted(Plain)
    found = [_trained_on_rank([], style)] + [_trained_on_rank([factory()], style) for factory in owner.methods]
    in_shards = owner.methods if owner.every_one_sharded else owner.methods[:1]
    for factory, result in zip(in_shards, found[1:], strict=False):
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
            if "fsdp2" in factory().strategies:
                found[-1] |= _adapted_in_shards(factory, owner.styles[0])
    return found


def _adapted_in_shards(factory: Callable[..., Method], style: Any) -> dict[str, Any]:
    """The same where both ranks share the parameters, twice: the answers of the first time, and whether it left a trace."""
    from lightning_peft.testing.adaptation import answers, built

    tested = built(type("Shards", (style,), {"configure_model": _shard}))
    before = {name: tensor.clone() for name, tensor in tested.state_dict().items()}
    first, again = (answers(tested, [factory()], devices=2, strategy=ModelParallelStrategy(2, 1)) for _ in range(2))
    after = {name: whole(tensor) for name, tensor in tested.state_dict().items()}
    return {"in shards": first, "changed in shards": difference(before, after) or difference(first, again)}


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
        The weights, whole, of ``"shards"``, of a training ``"resumed"`` after the first epoch, and of one ``"alone"``; and how
        the folder of shards that the first one saved at its end differs from the file of the second, under ``"folder"``.
    """

    def build(module: Any) -> None:
        style.build(module)
        module.double()

    def base_loss(module: Any, batch: Any) -> Any:
        return style.base_loss(module, [batch[0].double(), *batch[1:]])

    names = {"build": build, "base_loss": base_loss}
    alone, shards = type("Alone", (style,), names), type("Shards", (style,), names | {"configure_model": _shard})
    samples: Any = loader(64).dataset
    single = fit([factory()], style=alone, data=loader(64), max_epochs=2)

    def spread(folders: bool, **settings: Any) -> dict[str, Tensor]:
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=folders)
        data = DataLoader(samples, 4, sampler=DistributedSampler(samples, 2, dist.get_rank(), shuffle=False))
        shared: dict[str, Any] = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "max_epochs": 2}
        run = fit([factory()], style=shards, data=data, **shared, **settings)
        return {name: whole(tensor) for name, tensor in run.module.state_dict().items()}

    with _one_folder() as folder:
        trained = spread(True, after=[every_epoch(folder / "folders")])
        resumed = spread(False, resume=folder / "folders/epoch=0.ckpt", after=[every_epoch(folder / "files")])
        first, second = (_saved(folder / kind / "epoch=1.ckpt") for kind in ("folders", "files"))
    found = {"shards": trained, "resumed": resumed, "alone": dict(single.module.state_dict())}
    return found | {"folder": difference(first, second)}


def _saved(path: Path) -> dict[str, Any]:
    """What a checkpoint says of a training; states of parameters in the order of the optimizer."""
    found = resumable(read_checkpoint(path))
    found["optimizer_states"] = [list(state["state"].values()) for state in found["optimizer_states"]]
    return found


@contextmanager
def _one_folder() -> Iterator[Path]:
    """A folder that all ranks know, until all have left."""
    with TemporaryDirectory() as mine:
        shared = [mine]
        dist.broadcast_object_list(shared, src=0)
        yield Path(shared[0])
        dist.barrier()


def _shard(module: Any) -> None:
    """The usual ``configure_model``: blocks by themselves, and what is left with the whole."""
    if any(is_shard(parameter) for parameter in module.parameters()):
        return
    mesh = module.device_mesh["data_parallel"]
    for child in [child for child in module.children() if any(True for _ in child.parameters())]:
        within = [layer for layer in child.modules() if layer is not child and layer._parameters]
        for layer in (*within, child):
            fully_shard(layer, mesh=mesh)

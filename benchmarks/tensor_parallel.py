"""Trains every method that says it works under tensor parallelism, in processes that split the layers, and compares with one.

    export PYTHONPATH=tests/pairs
    python benchmarks/tensor_parallel.py                 # two processes split the layers
    python benchmarks/tensor_parallel.py --replicas 2    # two by two: FSDP2 shares between pairs that split them
    python benchmarks/tensor_parallel.py LoRA Wanda      # some, also those that do not say so

Layers are split by outputs, by inputs, and by outputs that do not divide; everything is in double precision. Each line has the
largest difference of a weight after two epochs from a training in one process on the same batches, and where a training that
goes on from the folder of shards of the first epoch differs. ``BALoRA``, whose loss belongs to a batch, ends elsewhere with
replicas.
"""

from __future__ import annotations

import argparse
import os
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from pairs import CONFIGURATIONS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import registry
from lightning_peft.strategies import sharding
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import Plain, loader, mlp, trainer
from lightning_peft.testing.trace import difference
from lightning_peft.weights.shards import whole

WIDTH = 2  # processes that split a layer


class Alone(Plain):
    """A small network with a norm."""

    def build(self) -> None:
        self.model = mlp().insert(4, nn.LayerNorm(16)).double()

    def base_loss(self, batch: Any) -> torch.Tensor:
        return super().base_loss([batch[0].double(), batch[1]])


class Split(Alone):
    """The same, split by those who share its layers, and shared between them and their replicas."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        last = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.model, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel(), "5": last})
        if mesh["data_parallel"].size() > 1:
            fully_shard(self.model[0], mesh=mesh["data_parallel"])
            fully_shard(self.model, mesh=mesh["data_parallel"])


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors, whole."""
    return {name: whole(tensor).detach().clone() for name, tensor in module.state_dict().items()}


def split(name: str, replicas: int, folder: str) -> dict[str, Any]:
    """Train as one of the processes, and once more from the first epoch's end."""
    sharding.check_layout = lambda *_: None  # whatever the method says of itself
    samples: Any = loader().dataset
    place = DistributedSampler(samples, replicas, int(os.environ["RANK"]) // WIDTH, shuffle=False)

    def trained(after: list[Any], resume: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module, strategy = Split(), ModelParallelStrategy(replicas, WIDTH)
        shared: dict[str, Any] = {"devices": replicas * WIDTH, "strategy": strategy, "use_distributed_sampler": False}
        runner = trainer(callbacks=[CONFIGURATIONS[name](), *after], max_epochs=2, **shared)
        runner.fit(module, DataLoader(samples, 8 // replicas, sampler=place), loader(8), ckpt_path=resume)
        return weights(module)

    try:
        left = trained([every_epoch(Path(folder))])
        return {"left": left, "resumed": difference(left, trained([], f"{folder}/epoch=0.ckpt"))}
    except Exception:
        return {"failed": traceback.format_exc()}


def outcome(name: str, replicas: int) -> str:
    """Say how a method's training ended."""
    with TemporaryDirectory() as folder:
        arguments = {"name": name, "replicas": replicas, "folder": folder}
        found = run_ddp(f"{__file__}:split", arguments, processes=replicas * WIDTH)[0]
    if "failed" in found:
        return f"failed: {found['failed'].strip().splitlines()[-1]}"
    torch.manual_seed(0)
    alone = Alone()
    trainer(callbacks=[CONFIGURATIONS[name]()], max_epochs=2).fit(alone, loader(), loader(8))
    error = max((value - found["left"][key]).abs().max().item() for key, value in weights(alone).items())
    return f"{error:.1e}, resumed {'the same' if found['resumed'] is None else found['resumed']}"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods; by default those that say so")
    parser.add_argument("--replicas", type=int, default=1, help="groups of processes that split the layers")
    arguments = parser.parse_args()
    said = [name for name, entry in registry.installed().items() if "tensor-parallel" in entry.load().strategies]
    for name in arguments.names or sorted(said):
        print(f"{name:20} {outcome(name, arguments.replicas)}", flush=True)


if __name__ == "__main__":
    main()

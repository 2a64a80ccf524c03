"""Modules that shard themselves, and their fits, each a rank's part of two."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import LoRA
from lightning_peft.testing.modules import Plain, loader, mlp, trainer
from lightning_peft.weights.shards import is_shard, whole

COURSE: dict[str, Any] = {"gradient_clip_val": 0.2, "accumulate_grad_batches": 2}
TARGETS = {"targets": ["model.0", "model.2"], "exclude": ()}


def shard(module: LightningModule, network: nn.Module) -> None:
    mesh = module.device_mesh["data_parallel"]  # type: ignore[index]
    fully_shard(network[0], mesh=mesh)  # type: ignore[index]
    fully_shard(network, mesh=mesh)


class Alone(Plain):
    """In double precision."""

    def build(self) -> None:
        self.model = mlp().double()

    def base_loss(self, batch: Any) -> Tensor:
        return super().base_loss([batch[0].double(), batch[1]])


class Made(Alone):
    """Makes its network when it is built, and shards it."""

    def configure_model(self) -> None:
        if not any(is_shard(parameter) for parameter in self.model.parameters()):
            shard(self, self.model)


def spread(**settings: Any) -> Trainer:
    strategy = ModelParallelStrategy(*settings.pop("sizes", (2, 1)), save_distributed_checkpoint=settings.pop("folders", False))
    return trainer(devices=2, strategy=strategy, use_distributed_sampler=False, **settings)


def of_rank(count: int = 32) -> DataLoader[Any]:
    samples: Any = loader(count).dataset
    return DataLoader(samples, 4, sampler=DistributedSampler(samples, 2, int(os.environ["RANK"]), shuffle=False))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in module.state_dict().items()}


def trained(
    module: LightningModule, methods: list[Any], resume: str | None = None, **settings: Any
) -> tuple[LightningModule, Trainer]:
    runner = spread(callbacks=methods, max_epochs=2, **settings)
    runner.fit(module, of_rank(), loader(8), ckpt_path=resume)
    return module, runner


def made(style: type[Plain], optimizer: str = "sgd") -> Any:
    torch.manual_seed(0)
    return style(optimizer)


def adapted() -> list[Any]:
    return [LoRA(2, alpha=8, **TARGETS)]

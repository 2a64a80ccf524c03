"""Lower precision under FSDP2, on two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import EVA, PSKD, DoRA, LoRA, MagnitudePruning, Method, NMSparsity, WeightCompander
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.trace import difference
from lightning_peft.weights.shards import is_shard, whole

TARGETS: dict[str, Any] = {"targets": ["model.0", "model.2"], "exclude": ()}
METHODS: dict[str, Callable[[], list[Method]]] = {  # on a layer that is a group of its own, and on one of the root's
    "together": lambda: [LoRA(2, **TARGETS), NMSparsity("2:4", **TARGETS), WeightCompander(**TARGETS), PSKD(alpha=0.3)],
    "SR-STE": lambda: [NMSparsity("2:4", "sr-ste", **TARGETS)],
    "DoRA": lambda: [DoRA(2, **TARGETS)],
    "EVA": lambda: [EVA(2, looks=2, **TARGETS)],
    "MagnitudePruning": lambda: [MagnitudePruning(0.5, **TARGETS)],
}
PRECISIONS = ("policy", "bf16-true", "bf16-mixed")
NEAR = 0.1  # of a norm


class Sharded(Plain):
    """Spread over processes."""

    policy = MixedPrecisionPolicy()

    def configure_model(self) -> None:
        if any(is_shard(parameter) for parameter in self.model.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for part in (self.model[0], self.model):
            fully_shard(part, mesh=mesh, mp_policy=self.policy)


class InHalf(Sharded):
    """Computes in bfloat16 with weights in single precision."""

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def trained(name: str, precision: str, *callbacks: Any, resume: str | None = None) -> LightningModule:
    torch.manual_seed(0)
    module = (InHalf if precision == "policy" else Sharded)("sgd")
    settings: dict[str, Any] = {} if precision == "policy" else {"precision": precision}
    settings["strategy"] = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    settings["callbacks"] = [*METHODS[name](), *callbacks]
    samples: Any = loader().dataset
    data = DataLoader(samples, 4, sampler=DistributedSampler(samples, 2, int(os.environ["RANK"]), shuffle=False))
    trainer(devices=2, use_distributed_sampler=False, max_epochs=2, **settings).fit(module, data, loader(8), ckpt_path=resume)
    return module


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in module.state_dict().items()}


def on_rank(folder: str) -> dict[str, Any]:
    """Train every method in every precision, and go on from its first epoch."""
    found: dict[str, Any] = {}
    for name in METHODS:
        for precision in PRECISIONS:
            place = f"{folder}/{name}-{precision}"
            saves = ModelCheckpoint(place, filename="{epoch}", save_top_k=-1)
            done = weights(trained(name, precision, saves))
            resumed = weights(trained(name, precision, resume=f"{place}/epoch=0.ckpt"))
            found[f"{name} {precision}"] = {"done": done, "resumed": resumed}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ddp(f"{__file__}:on_rank", {"folder": str(tmp_path_factory.mktemp("shards"))})


@pytest.fixture(scope="module")
def exact() -> dict[str, dict[str, Tensor]]:
    """What one process ends with in single precision on the batches of both."""
    found = {}
    for name, make in METHODS.items():
        torch.manual_seed(0)
        module = Plain("sgd")
        trainer(callbacks=make(), max_epochs=2).fit(module, loader(), loader(8))
        found[name] = weights(module)
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", METHODS)
class TestLowerPrecision:
    def test_processes_end_with_one_module_of_its_type(self, ranks: list[dict[str, Any]], name: str, precision: str) -> None:
        one, other = (rank[f"{name} {precision}"]["done"] for rank in ranks)
        assert difference(one, other) is None
        assert {value.dtype for value in one.values()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}

    def test_goes_on_bit_for_bit(self, ranks: list[dict[str, Any]], name: str, precision: str) -> None:
        found = ranks[0][f"{name} {precision}"]
        assert difference(found["done"], found["resumed"]) is None

    def test_ends_near_single_precision(
        self, ranks: list[dict[str, Any]], exact: dict[str, dict[str, Tensor]], name: str, precision: str
    ) -> None:
        for key, value in ranks[0][f"{name} {precision}"]["done"].items():
            off = (value.float() - exact[name][key]).norm() / exact[name][key].norm()
            assert off < NEAR, f"{key} is off by {off:.3f} of its norm"

    def test_masks_hold(self, ranks: list[dict[str, Any]], name: str, precision: str) -> None:
        done = ranks[0][f"{name} {precision}"]["done"]
        for layer in ("model.0", "model.2") if name in ("together", "SR-STE") else ():
            assert done[f"{layer}.weight"].view(-1, 4).count_nonzero(1).eq(2).all()

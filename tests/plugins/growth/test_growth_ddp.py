"""Growth in two processes: the same network on both, and the same when resumed; shards only of what has grown already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from growth_toys import Deep, grow, values
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_peft import LayerGrowth, load_from_checkpoint
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing import run_ddp
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import loader, trainer
from lightning_peft.testing.trace import difference

HERE = str(Path(__file__))


def train(folder: str, resume: str = "", average: bool = False) -> dict[str, Any]:
    """One rank of a training that grows twice; each rank seeds its edits differently, and rank 0's must win."""
    rank = int(__import__("os").environ["RANK"])
    seen = []
    method = LayerGrowth(at=["step:2", "step:4"], start=1, to=[2, 4], seed=rank, optimizer_state="copy")
    run = grow(
        [method],
        before=[EMAWeightAveraging(decay=0.5)] if average else [],
        after=[every_epoch(Path(folder))],
        resume=resume or None,
        seed=5 if resume else 0,
        devices=2,
        strategy="ddp",
    )
    seen += [edit["seed"] for edit in journal_of(run.module) if "seed" in edit]
    return {"weights": values(run.module), "seeds": seen}


@pytest.mark.parametrize("average", [True, False])
def test_ranks_stay_one_network(average: bool, tmp_path: Path) -> None:
    whole = run_ddp(f"{HERE}:train", {"folder": str(tmp_path), "average": average})
    assert difference(whole[0], whole[1]) is None
    assert whole[0]["seeds"] == [0, 1]
    assert sum(name.endswith("fc1.weight") for name in whole[0]["weights"]) == 4
    arguments = {"resume": str(tmp_path / "epoch=0.ckpt"), "average": average}
    resumed = run_ddp(f"{HERE}:train", {"folder": str(tmp_path / "again"), **arguments})
    assert difference(whole[0], resumed[0]) is None


def test_sharded_strategies_are_refused_with_the_reason() -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    from lightning_peft.strategies.support import check_strategy

    class Sharded(FSDPStrategy):
        def __init__(self) -> None: ...

    runner = trainer(callbacks=[LayerGrowth(start=2)])
    runner.strategy.__class__ = Sharded
    with pytest.raises(
        MisconfigurationException,
        match=r"layer_growth does not work under the fsdp strategy.*shards.*ddp, single.*load_from_checkpoint.*configure_model",
    ):
        check_strategy(runner, [LayerGrowth(start=2)])


class Sharded(Deep):
    """Shards its layers as users of FSDP2 do."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            for part in (*self.blocks, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def train_on(path: str, sharded: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """One rank of a training that begins with a grown network; returns how many tensors were shards, and all of them whole."""
    module = load_from_checkpoint(Sharded, path)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    runner = trainer(devices=2, strategy=strategy, max_epochs=1, use_distributed_sampler=True)
    runner.fit(module, loader())
    shards = [tensor for tensor in module.parameters() if hasattr(tensor, "full_tensor")]
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in module.named_parameters()}
    return len(shards), whole


def test_a_grown_network_can_be_sharded(tmp_path: Path) -> None:
    """FSDP2 lays its shards out before training, so growth comes first; what has grown trains sharded as under DDP."""
    path = tmp_path / "grown.ckpt"
    grow([LayerGrowth(start=1, to=3, at="step:2")]).trainer.save_checkpoint(path, weights_only=True)
    shards, whole = run_ddp(f"{HERE}:train_on", {"path": str(path), "sharded": True})[0]
    _, wrapped = run_ddp(f"{HERE}:train_on", {"path": str(path), "sharded": False})[0]
    assert shards == len(whole)
    assert sum(name.endswith("fc1.weight") for name in whole) == 3
    torch.testing.assert_close(whole, wrapped, rtol=1e-4, atol=1e-6)

"""Growth in two processes: the same network on both, and the same when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from growth_toys import grow, values
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_peft import LayerGrowth
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing import run_ddp
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import trainer
from lightning_peft.testing.trace import difference

HERE = str(Path(__file__))


def train(folder: str, strategy: str, resume: str = "", average: bool = False) -> dict[str, Any]:
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
        strategy=strategy,
    )
    seen += [edit["seed"] for edit in journal_of(run.module) if "seed" in edit]
    return {"weights": values(run.module), "seeds": seen}


@pytest.mark.parametrize("strategy", ["ddp", "adaptive_ddp"])
def test_ranks_stay_one_network(strategy: str, tmp_path: Path) -> None:
    whole = run_ddp(f"{HERE}:train", {"folder": str(tmp_path), "strategy": strategy, "average": strategy == "ddp"})
    assert difference(whole[0], whole[1]) is None
    assert whole[0]["seeds"] == [0, 1]
    assert sum(name.endswith("fc1.weight") for name in whole[0]["weights"]) == 4
    arguments = {"strategy": strategy, "resume": str(tmp_path / "epoch=0.ckpt"), "average": strategy == "ddp"}
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
        MisconfigurationException, match=r"layer_growth does not work under the fsdp strategy.*shards.*ddp, single"
    ):
        check_strategy(runner, [LayerGrowth(start=2)])

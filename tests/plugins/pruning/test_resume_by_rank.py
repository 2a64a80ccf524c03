"""Trainings of several ranks, resumed amid what each of them saw of its own samples."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import GBLM, ISSP, BlockPruning, MaskedPruning, Method, Wanda
from lightning_peft.testing.modules import Plain, deepened, loader, trainer
from lightning_peft.testing.trace import difference

EVERY = 3
METHODS: dict[str, Callable[[], Method]] = {
    "Wanda": lambda: Wanda(0.5, end=6, every=EVERY, exclude=()),
    "GBLM": lambda: GBLM(0.5, end=6, every=EVERY, exclude=()),
    "ISSP": lambda: ISSP(0.5, end=6, every=EVERY, exclude=()),
    "MaskedPruning": lambda: MaskedPruning(0.5, end=6, every=EVERY, exclude=()),
    "BlockPruning": lambda: BlockPruning(0.5, start=4, end=8, every=4),
}


def samples(*ranks: int) -> DataLoader[Any]:
    """Other samples for every rank, the same in every step."""
    return DataLoader(loader(8).dataset, batch_sampler=[[i for rank in ranks for i in range(4 * rank, 4 * rank + 4)]] * 4)


def trained(
    name: str, data: DataLoader[Any], *, resume: str | None = None, saves: str = "", **settings: Any
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = deepened(Plain)("adam")
    kept = [ModelCheckpoint(saves, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if saves else []
    runner = trainer(callbacks=[METHODS[name](), *kept], use_distributed_sampler=False, max_epochs=3, **settings)
    runner.fit(module, data, loader(8), ckpt_path=resume)
    return {key: value.clone() for key, value in module.state_dict().items()}


def on_rank(folder: str) -> dict[str, Any]:
    """Train every method and go on from every step within an epoch; return what it ended with, and where that differed."""
    found: dict[str, Any] = {}
    data, ranks = samples(int(os.environ["RANK"])), {"devices": 2, "strategy": "ddp"}
    for name in METHODS:
        whole = trained(name, data, saves=f"{folder}/{name}", **ranks)
        files = [file for file in sorted(Path(folder, name).iterdir()) if int(file.stem.split("=")[1]) % 4]
        again = {file.stem: difference(whole, trained(name, data, resume=str(file), **ranks)) for file in files}
        found[name] = {"whole": whole, "differ": {step: text for step, text in again.items() if text}, "tried": len(again)}
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_rank_goes_on_from_what_it_saw(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["tried"] == 9
        assert rank[name]["differ"] == {}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
def test_one_rank_goes_on_from_what_both_saw(ranks: list[dict[str, Any]], folder: Path, name: str, step: int) -> None:
    file = folder / name / f"step={step}.ckpt"
    alone = trained(name, samples(0, 1), resume=str(file))
    for key, value in ranks[0][name]["whole"].items():
        torch.testing.assert_close(alone[key], value, rtol=1e-4, atol=1e-5)

"""PSKD on two ranks: the same weights and the same memory as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from pskd_toys import CLASSES, Lit, Points, trainer
from torch import nn
from torch.utils.data import DataLoader, Sampler

from lightning_peft.testing.ddp import run_ddp
from lightning_peft_plugins.regularizers.pskd import PSKD


class Dealt(Sampler[int]):
    """The order in which ``DistributedSampler(shuffle=True)`` deals samples to its ranks."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Plain(Lit):
    """Without batch statistics and dropout, two half batches equal a whole one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))  # type: ignore[assignment]


class SaveMidEpoch(Callback):
    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 1:
            trainer.save_checkpoint(self.file, weights_only=False)


def train(sizes: list[int], devices: int, folder: str) -> list[dict[str, Any]]:
    """Train once for each size, with a whole batch of 4 over all ranks, and return what this rank ends with."""
    results = []
    for size in sizes:
        method, module = PSKD(0.9), Plain()
        order = {"shuffle": True} if devices > 1 else {"sampler": Dealt(size)}
        run = trainer(
            method,
            SaveMidEpoch(f"{folder}/{size}-{devices}.ckpt"),
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
        )
        run.fit(module, DataLoader(Points(size), batch_size=4 // devices, **order))
        assert method.memory is not None
        weights = {name: weight.clone() for name, weight in module.state_dict().items()}
        results.append({"weights": weights, "hash": hash("a word"), **method.memory.state()})
    return results


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    # 18 samples are dealt evenly; of 17 the sampler deals one twice.
    arguments = {"sizes": [18, 17], "devices": 2, "folder": str(tmp_path)}
    first, second = run_ddp(f"{__file__}:train", arguments, fresh=True)
    assert first[0]["hash"] != second[0]["hash"], "each rank orders its sets in its own way"
    [single] = train([18], 1, str(tmp_path))
    assert torch.allclose(first[0]["probabilities"], single["probabilities"], atol=1e-6)
    for name, weight in single["weights"].items():
        assert torch.allclose(first[0]["weights"][name], weight, atol=1e-6), name
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine["probabilities"], other["probabilities"])
        assert mine["seen"].all()
        assert other["seen"].all()
    states = [
        torch.load(tmp_path / f"18-{devices}.ckpt", weights_only=True)["callbacks"]["lightning_peft/pskd"]["state"]
        for devices in (2, 1)
    ]
    assert int(states[0]["seen"].sum()) == 8
    assert torch.equal(states[0]["seen"], states[1]["seen"])
    assert torch.allclose(states[0]["probabilities"], states[1]["probabilities"], atol=1e-6)

"""Ranks whose last batch has another size each: plain Lightning trains on them, and so do methods, all ranks the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import EVA, GBLM, PSKD, BlockPruning, LayerGrowth, LoRA, MaskedPruning, Method, NMSparsity, Tent, Wanda
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import Plain, deepened, loader, trainer
from lightning_peft.testing.trace import difference

SIZES = (6, 6, 1), (6, 2, 5)  # of a rank's batches
SAMPLES = sum(map(sum, SIZES))
WHOLE: dict[str, Any] = {"exclude": ()}
METHODS: dict[str, Callable[[], list[Method]]] = {
    "PSKD": lambda: [PSKD(alpha=0.5)],
    "NMSparsity": lambda: [NMSparsity("2:4", "sr-ste", targets="all-linear"), LoRA(2, targets="all-linear")],
    "LayerGrowth": lambda: [LayerGrowth(at="step:2", start=2)],
    "LiGO": lambda: [LayerGrowth(at="step:2", start=2, operator="ligo")],
    "Wanda": lambda: [Wanda(0.5, end=6, every=1, **WHOLE)],
    "GBLM": lambda: [GBLM(0.5, end=6, every=1, **WHOLE)],
    "Beta-Rank": lambda: [MaskedPruning(0.5, "beta", end=6, every=1, **WHOLE)],
    "BlockPruning": lambda: [BlockPruning(1, start=4)],
    "EVA": lambda: [EVA(2, looks=3, targets="all-linear")],
}
STILL = ("Wanda", "EVA")  # sums over samples, whoever saw them: chosen as in one process where weights stand still


def batches(*ranks: int) -> DataLoader[Any]:
    """Batches of some ranks, those of one step together."""
    places = iter(range(SAMPLES))
    own = [[[next(places) for _ in range(size)] for size in sizes] for sizes in SIZES]
    steps = [[place for rank in ranks for place in own[rank][step]] for step in range(3)]
    return DataLoader(loader(SAMPLES).dataset, batch_sampler=steps)


def trained(methods: list[Method], data: DataLoader[Any], lr: float = 0.02, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = deepened(Plain)("sgd", lr)
    runner = trainer(callbacks=methods, use_distributed_sampler=False, max_epochs=3, **settings)
    runner.fit(module, data, loader(8))
    return {name: value.clone() for name, value in module.state_dict().items()}


def refused() -> str:
    """Adapt on one batch more on one rank than on the other."""
    data = DataLoader(loader(32).dataset, batch_sampler=[[0, 1]] * (2 + int(os.environ["RANK"])))
    try:
        methods, ranks = [Tent(sync="mean", targets=["re:blocks.*norm"])], {"devices": 2, "strategy": "ddp"}
        runner = trainer(callbacks=methods, use_distributed_sampler=False, **ranks)
        runner.test(deepened(Plain)(), data, verbose=False)
    except MisconfigurationException as error:
        return str(error)
    return "nothing was refused"


def on_rank() -> dict[str, Any]:
    """Train with every method, and with some of them at a rate of zero."""
    data, ranks = batches(int(os.environ["RANK"])), {"devices": 2, "strategy": "ddp"}
    found: dict[str, Any] = {}
    for name, make in METHODS.items():
        methods = make()
        found[name] = trained(methods, data, **ranks)
        if isinstance(methods[0], PSKD):
            found["remembered"] = methods[0].memory.seen.clone(), methods[0].memory.probabilities.clone()
    found |= {f"{name}, still": trained(METHODS[name](), data, lr=0.0, **ranks) for name in STILL}
    found["refused"] = refused()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ddp(f"{Path(__file__)}:on_rank")


@pytest.mark.parametrize("name", METHODS)
def test_all_ranks_end_with_one_module(ranks: list[dict[str, Any]], name: str) -> None:
    one, other = (rank[name] for rank in ranks)
    assert difference(one, other) is None
    assert all(value.isfinite().all() for value in one.values())


def test_pskd_remembers_every_sample_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    (seen, rows), other = (rank["remembered"] for rank in ranks)
    assert difference([seen, rows], list(other)) is None
    assert seen.all()
    torch.testing.assert_close(rows.sum(1), torch.ones(SAMPLES))


@pytest.mark.parametrize("name", STILL)
def test_statistics_are_those_of_all_samples(ranks: list[dict[str, Any]], name: str) -> None:
    alone = trained(METHODS[name](), batches(0, 1), lr=0.0)
    for key, value in ranks[0][f"{name}, still"].items():
        torch.testing.assert_close(value, alone[key])


def test_ranks_that_adapt_as_one_need_as_many_batches_each(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert 'sync="mean"' in rank["refused"]
        assert "2 and 3 batches" in rank["refused"]

"""Streams without a length and endless training: what needs no end works as it would beside one, the rest names a cure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import (
    PSKD,
    BlockPruning,
    LayerGrowth,
    MagnitudePruning,
    Method,
    NMSparsity,
    StructuredPruning,
    TrainedRankPruning,
    WeightCompander,
)
from lightning_peft.testing.modules import Plain, deepened, loader
from lightning_peft.testing.runs import fit


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        index = iter(range(32))
        return ((*sample, next(index)) for sample in loader().dataset)


class Stops(Callback):
    """Ends a training that has no end, after two epochs."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


NEEDS_NO_END: dict[str, Callable[[], Method]] = {
    "one-shot": lambda: NMSparsity("2:4", recipe="one-shot", dense=3),
    "sr-ste": lambda: NMSparsity("2:4", recipe="sr-ste"),
    "mdgf with a decay": lambda: NMSparsity("2:4", recipe="mdgf-linear", decay=0.2),
    "compander": lambda: WeightCompander(),
    "one choice": lambda: MagnitudePruning(0.5, start=4, end=None),
    "choices": lambda: MagnitudePruning(0.5, start=2, end=6, every=2),
    "cuts": lambda: StructuredPruning(0.3, start=2, end=6, every=2),
    "blocks": lambda: BlockPruning(1, start=4, every=2),
    "growth": lambda: LayerGrowth(at="step:4", start=2, to=4, lr="continue"),
    "memory": lambda: PSKD(sample_index="2", epochs=2, num_samples=32),
    "rank": lambda: TrainedRankPruning(0.9, period=3),
}


@pytest.mark.filterwarnings("ignore:.*the end of this training is not known")
@pytest.mark.parametrize("name", NEEDS_NO_END)
def test_what_needs_no_end_is_the_same_without_one(name: str) -> None:
    style = deepened(Plain) if name in ("blocks", "growth") else Plain

    def weights(data: Any, **limits: Any) -> dict[str, Any]:
        return dict(fit([NEEDS_NO_END[name]()], style=style, data=data, after=[Stops()], **limits).module.state_dict())

    indexed = list(Stream())
    expected = weights(DataLoader(indexed, 8), max_epochs=2)
    for found in (weights(DataLoader(Stream(), 8), max_epochs=2), weights(DataLoader(indexed, 8), max_epochs=-1)):
        if name != "rank":  # its last truncation comes after the last step, when that is known
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert found.keys() == expected.keys()


@pytest.mark.parametrize(
    ("method", "match", "cured"),
    [
        (lambda: NMSparsity("2:4"), 'recipe="sr-ste", "ste" or "one-shot"', lambda: NMSparsity("2:4", recipe="sr-ste")),
        (lambda: NMSparsity("2:4", recipe="ste", fine_tune="10%"), "fine_tune=0", lambda: NMSparsity("2:4", recipe="ste")),
        (lambda: MagnitudePruning(0.5, start=2, end=6), "^every= at 1 % of training", NEEDS_NO_END["choices"]),
        (lambda: PSKD(sample_index="2"), r"give PSKD\(epochs=...\)", NEEDS_NO_END["memory"]),
    ],
)
def test_what_needs_an_end_names_a_cure_that_works(
    method: Callable[[], Method], match: str, cured: Callable[[], Method]
) -> None:
    limits = {"data": DataLoader(list(Stream()), 8), "max_epochs": -1, "after": [Stops()]}
    with pytest.raises(MisconfigurationException, match=match):
        fit([method()], **limits)
    fit([cured()], **limits)
    fit([method()], **{**limits, "max_epochs": 2})

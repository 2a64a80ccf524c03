"""Killed in the middle of an epoch and resumed: what Lightning does with the loader decides whether that is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful_dataloader import _StatefulMultiProcessingDataLoaderIter

from lightning_peft import (
    PSKD,
    LayerGrowth,
    MagnitudePruning,
    Method,
    NMSparsity,
    StructuredPruning,
    TrainedRankPruning,
    WeightCompander,
)
from lightning_peft.testing.modules import Plain, deepened, loader
from lightning_peft.testing.runs import Fit, assert_same, fit

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's constructor calls it

KILLED_AT = 6  # of 4 steps an epoch, 3 epochs: two batches into the second

METHODS: dict[str, Callable[[], list[Method]]] = {
    "maps": lambda: [NMSparsity("2:4", fine_tune="25%"), WeightCompander()],
    "memory": lambda: [PSKD()],
    "choice": lambda: [MagnitudePruning(0.5, start=2, end="75%", every=2)],
    "steps": lambda: [TrainedRankPruning(0.9, period=3)],
    "growth": lambda: [LayerGrowth(at=["step:5", "step:8"], start=1, to=[2, 4])],
    "cuts": lambda: [StructuredPruning(0.3, start=2, end=8, every=3, score="taylor")],
    "all at once": lambda: [NMSparsity("2:4"), WeightCompander(), PSKD()],
}


class Killed(RuntimeError):
    pass


class KillAt(Callback):
    """Saves a checkpoint and dies, as a machine does that is taken away."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == KILLED_AT:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise Killed


class Order(Callback):
    """Notes the first number of every sample, which is its name."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.seen.append(batch[0][:, 0].tolist())


class AsksForSteps(Plain):
    """Asks for the number of steps before the checkpoint is read, so that the loader is set up without its position."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()


class Ended(StatefulDataLoader[Any]):
    """Knows its iterators, so that their workers can be ended: left to the collector, each keeps it waiting for seconds."""

    begun: ClassVar[WeakSet[Any]] = WeakSet()

    def _get_iterator(self) -> Any:
        found = super()._get_iterator()
        self.begun.add(found)
        return found


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """End what is left when the test is over: comparing what fits would save makes iterators too."""
    yield
    for iterator in Ended.begun:
        if isinstance(iterator, _StatefulMultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


def trained(methods: list[Method], **settings: Any) -> Fit:
    return fit(methods, max_epochs=3, **settings)


def shuffled(seed: int, **options: Any) -> Ended:
    torch.manual_seed(seed)
    return Ended(loader().dataset, batch_size=8, shuffle=True, **options)


def killed_and_resumed(
    methods: Callable[[], list[Method]], data: Callable[[int], Any], path: Path, style: type[Plain] = Plain
) -> tuple[Fit, Fit, list[Any], list[Any]]:
    """Train through, and again with a kill; return both with the samples that each saw from the kill on.

    ``data`` is given the seed of its order, another one after the kill, since the order must come from the checkpoint.
    """
    through, rest = Order(), Order()
    whole = trained(methods(), data=data(3), style=style, before=[through])
    with pytest.raises(Killed):
        trained(methods(), data=data(3), style=style, after=[KillAt(path)])
    resumed = trained(methods(), data=data(5), style=style, before=[rest], resume=path, seed=7)
    return whole, resumed, through.seen[KILLED_AT:], rest.seen


@pytest.mark.parametrize("name", METHODS)
def test_a_stateful_loader_makes_it_exact(name: str, tmp_path: Path) -> None:
    style = deepened(Plain) if name == "growth" else Plain
    found = killed_and_resumed(METHODS[name], shuffled, tmp_path / "mid.ckpt", style)
    whole, resumed, expected, seen = found
    assert seen == expected
    assert_same(whole, resumed, f"{name}, resumed in the middle of an epoch")


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"num_workers": 1, "snapshot_every_n_steps": 4},
        {"num_workers": 0, "batch_sampler": "own"},
    ],
)
def test_samples_are_known_however_the_loader_finds_its_position(options: dict[str, Any], tmp_path: Path) -> None:
    def data(seed: int) -> StatefulDataLoader[Any]:
        if "batch_sampler" in options:
            return StatefulDataLoader(loader().dataset, batch_sampler=[list(range(n, 32, 4)) for n in (2, 0, 3, 1)])
        return shuffled(seed, **options)

    whole, resumed, expected, seen = killed_and_resumed(METHODS["memory"], data, tmp_path / "mid.ckpt")
    assert seen == expected
    assert_same(whole, resumed, "PSKD, resumed in the middle of an epoch")


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "snapshot_every_n_steps": 4}], ids=["", "workers"])
def test_a_loader_that_was_set_up_before_the_checkpoint_was_read_gets_its_position(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def data(seed: int) -> Any:
        found = shuffled(seed, **options)
        found.state_dict()  # a look, which makes an iterator
        return found

    found = killed_and_resumed(METHODS["all at once"], data, tmp_path / "mid.ckpt", AsksForSteps)
    whole, resumed, expected, seen = found
    assert seen == expected
    assert_same(whole, resumed, "resumed in the middle of an epoch")


def test_a_plain_loader_begins_anew(tmp_path: Path) -> None:
    """Lightning takes as many batches as were left, but from the start of a new order: some samples twice, some never."""
    *_, expected, seen = killed_and_resumed(list, lambda seed: loader(), tmp_path / "mid.ckpt")
    assert len(seen) == len(expected) == 6
    first = loader().dataset
    assert isinstance(first, TensorDataset)
    names = first.tensors[0][:, 0].tolist()
    # Even without shuffling the epoch that was cut short sees its first half again and its second half never.
    assert seen[:2] == [names[:8], names[8:16]] != expected[:2]
    assert seen[2:] == expected[2:]


class Places:
    """The batches of an epoch from a place on."""

    def __init__(self) -> None:
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        return iter([list(range(n, 32, 4)) for n in (2, 0, 3, 1)][start:])

    def __len__(self) -> int:
        return 4


class Private(DataLoader[Any]):
    """Finds its position again in a way of its own."""

    def __init__(self, seed: int) -> None:
        data: Any = loader().dataset
        super().__init__(TensorDataset(*data.tensors, torch.arange(32)), batch_sampler=Places())
        self.done = 0

    def __iter__(self) -> Any:
        for self.done, batch in enumerate(super().__iter__(), 1):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch_sampler.start = state["done"]  # type: ignore[union-attr]


def test_a_loader_whose_position_is_its_secret_is_refused_and_the_cure_works(tmp_path: Path) -> None:
    refused = r'is a Private, which restores its own position.*sample_index="<key or position>"'
    with pytest.raises(MisconfigurationException, match=refused):
        killed_and_resumed(METHODS["memory"], Private, tmp_path / "mid.ckpt")
    whole, resumed, expected, seen = killed_and_resumed(lambda: [PSKD(sample_index="2")], Private, tmp_path / "mid.ckpt")
    assert seen == expected
    assert_same(whole, resumed, "PSKD with the index in the batch")

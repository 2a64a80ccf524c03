from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, WeightedRandomSampler

from lightning_peft import Lane, Method, Resource
from lightning_peft.capture.draws import Draws, RecordingBatchSampler, listen_to
from lightning_peft.testing import modules
from lightning_peft.testing.ddp import run_ddp

torch.set_num_threads(1)
SIZE = 22


class Selves(Dataset[Any]):
    """Every sample is its own index."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch[:, None].float()).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Validated(Lit):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        return None


class Follows(Method):
    """Notes, for every step, what was recorded and what the batch really holds."""

    lane = Lane.LOSS
    reads = frozenset({Resource.LOGITS, Resource.SAMPLE_INDEX})

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[list[int], list[int]]] = []
        self.sizes: set[int] = set()

    def loss(self, step: Any) -> None:
        self.pairs.append((step.sample_index.tolist(), step.batch.tolist()))
        self.sizes.add(step.run.samples.size)


def trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    return modules.trainer(**{"max_epochs": 2, "num_sanity_val_steps": 2, "callbacks": list(callbacks), **options})


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Selves(), **{"batch_size": 4, "shuffle": True, **options})


def follow(train: Any, steps: int, *callbacks: Callback, val: Any = None, **options: Any) -> Follows:
    method = Follows()
    trainer(method, *callbacks, **options).fit(Lit() if val is None else Validated(), train, val)
    assert_followed(method, steps)
    return method


def assert_followed(method: Follows, steps: int) -> None:
    assert len(method.pairs) == steps
    for recorded, real in method.pairs:
        assert recorded == real


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": False},
        {"drop_last": True},
        {"shuffle": None, "sampler": WeightedRandomSampler(torch.rand(SIZE), 22)},
        {"shuffle": None, "sampler": SubsetRandomSampler(range(3, 21))},
        {"batch_size": 1, "shuffle": None, "batch_sampler": [[0, 5], [7], [1, 1, 2]]},
    ],
)
def test_recorded_is_what_the_dataset_returned(workers: int, options: dict[str, Any]) -> None:
    data = loader(num_workers=workers, **options)
    method = follow(data, 2 * len(data))
    assert method.sizes == {SIZE}


def test_shuffled_batches_differ_between_epochs() -> None:
    method = follow(loader(), 12)
    assert [pair[1] for pair in method.pairs[:6]] != [pair[1] for pair in method.pairs[6:]]


def test_recording_draws_no_random_numbers() -> None:
    torch.manual_seed(5)
    method = follow(loader(), 12)
    torch.manual_seed(5)
    real: list[list[int]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
            real.append(batch.tolist())

    trainer(Watch()).fit(Lit(), loader())
    assert [pair[1] for pair in method.pairs] == real


@pytest.mark.parametrize("workers", [0, 2])
def test_limited_epochs(workers: int) -> None:
    follow(loader(num_workers=workers), 9, limit_train_batches=3, max_epochs=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_persistent_workers_and_an_iterator_from_before(workers: int) -> None:
    data = loader(num_workers=workers, persistent_workers=workers > 0)
    next(iter(data))
    follow(data, 12)


def test_reloaded_loaders() -> None:
    class Reloads(Lit):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

    method = Follows()
    trainer(method, reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(Reloads())
    assert_followed(method, 18)
    data = loader()
    follow(data, 18, reload_dataloaders_every_n_epochs=1, max_epochs=3)
    assert not isinstance(data.batch_sampler, RecordingBatchSampler)


def test_a_loader_is_given_back_as_it_was() -> None:
    data = loader()
    before = dict(vars(data))
    follow(data, 12)
    assert vars(data) == before
    follow(data, 12)
    assert vars(data) == before

    class Fails(Lit):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trainer(Follows()).fit(Fails(), data)
    assert vars(data) == before


def test_second_fit_of_one_trainer() -> None:
    method, data, module = Follows(), loader(), Lit()
    run = trainer(method)
    run.fit(module, data)
    run.fit_loop.max_epochs = 4
    run.fit(module, data)
    assert_followed(method, 24)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_on_the_same_loader(workers: int) -> None:
    data = loader(num_workers=workers)
    follow(data, 12, val=data, val_check_interval=0.5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end"])
def test_a_callback_that_reads_the_loader_too(workers: int, hook: str) -> None:
    data = loader(num_workers=workers)

    def read(*args: Any) -> None:
        for _ in data:
            pass

    reads = Callback()
    setattr(reads, hook, read)
    follow(data, 6, reads, max_epochs=3, limit_train_batches=2)


def test_a_callback_that_keeps_an_iterator_is_named() -> None:
    data = loader()

    class Keeps(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.kept = iter(data)
            next(self.kept)

    with pytest.raises(MisconfigurationException, match="holds an iterator over the training loader"):
        trainer(Keeps(), Follows()).fit(Lit(), data)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_begun_within_an_epoch_and_kept_is_harmless(workers: int) -> None:
    data = loader(num_workers=workers)

    class Keeps(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 0 and batch_idx == 1:
                self.kept = iter(data)
                next(self.kept)

        def on_fit_end(self, *args: Any) -> None:
            del self.kept  # the collector would wait for its workers, in a later test

    follow(data, 18, Keeps(), max_epochs=3)


def test_batches_that_collate_to_none_keep_the_count() -> None:
    def collate(samples: list[int]) -> Tensor | None:
        return None if samples[0] in (0, 8, 12) else torch.tensor(samples)

    data = loader(shuffle=False, collate_fn=collate)
    with pytest.warns(UserWarning, match="yielded None"):
        method = follow(data, 6)
    assert [pair[1][0] for pair in method.pairs] == [4, 16, 20] * 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "mid.ckpt", weights_only=False)

    method = follow(loader(), 12, Save())
    again = Follows()
    trainer(again, max_epochs=3).fit(Lit(), loader(), ckpt_path=tmp_path / "mid.ckpt")
    # Lightning starts a plain loader anew and takes the batches that were left: 4 of the second epoch, 6 of the third.
    assert_followed(again, 10)
    assert len(method.pairs) == 12


@pytest.mark.parametrize("when", ["after fit began", "in the trainer"])
def test_step_count_asked_before_training(when: str) -> None:
    """Schedulers that ask for the number of steps make Lightning set the loader up early."""

    class Asks(Validated):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 12
            return super().configure_optimizers()

    method = Follows()
    data = loader(num_workers=2 if when == "in the trainer" else 0)
    trainer(method, num_sanity_val_steps=2).fit(Asks(), data, loader(shuffle=False))
    assert_followed(method, 12)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


class Bare:
    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.arange(4)])


class TakesIterator(Lit):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return self.net(batch[:, None].float()).mean()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "iterable, so its samples have no index"),
        (lambda: DataLoader(Selves(), batch_size=None, collate_fn=lambda i: torch.tensor([i])), "batching switched off"),
        (lambda: Bare(), "is a Bare, whose sample order is not known"),
        (lambda: CombinedLoader([loader(), loader()], "min_size"), "There are 2 training loaders"),
    ],
)
def test_loaders_without_an_index_are_refused(data: Any, match: str) -> None:
    class First(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0] if isinstance(batch, (list, tuple)) else batch.flatten(), batch_idx)

    with pytest.raises(MisconfigurationException, match=f'({match}).*sample_index="<key or position>"'):
        trainer(Follows()).fit(First(), data())


def test_other_refusals() -> None:
    with pytest.raises(MisconfigurationException, match="in_order=False"):
        trainer(Follows()).fit(Lit(), loader(num_workers=1, in_order=False))
    with (
        pytest.warns(UserWarning, match="dataloader_iter"),
        pytest.raises(MisconfigurationException, match="takes a dataloader_iter"),
    ):
        trainer(Follows()).fit(TakesIterator(), loader())

    class Keyed(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, key: str) -> int:
            return ord(key)

    with pytest.raises(MisconfigurationException, match="does not yield integer positions"):
        trainer(Follows()).fit(Lit(), DataLoader(Keyed(), batch_sampler=[["a", "b"], ["c", "d"]]))


def test_a_batch_without_positions_keeps_the_count() -> None:
    draws = Draws(iter([["a", "b"], [3, 4], None, [5]]))
    assert list(draws) == [["a", "b"], [3, 4], None, [5]]
    assert [draws.arrive(place) for place in range(5)] == [None, [3, 4], None, [5], None]


def test_a_recording_sampler_is_transparent() -> None:
    class Inner:
        batch_size = 4

        def __init__(self) -> None:
            self.epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[list[int]]:
            return iter([[self.epoch]])

        def __len__(self) -> int:
            return 1

    inner = Inner()
    recording = RecordingBatchSampler(inner, lambda: True)
    recording.set_epoch(3)
    recording.batch_size = 8
    assert (inner.epoch, inner.batch_size, len(recording)) == (3, 8, 1)
    assert list(recording) == [[3]]
    assert type(copy.deepcopy(recording)) is Inner
    for names in ((), ("state_dict", "load_state_dict")):
        kind = type("Kind", (Inner,), dict.fromkeys(names, lambda *args: {}))
        stand_in = type(listen_to(kind(), lambda: True))
        assert [name for name in ("state_dict", "load_state_dict") if hasattr(stand_in, name)] == list(names)
    torch_sampler = RecordingBatchSampler(DataLoader(Selves(), batch_size=4).batch_sampler, lambda: True)
    assert len(pickle.loads(pickle.dumps(torch_sampler))) == 6


def follow_on_rank(workers: int) -> list[Any]:
    # Gloo runs threads in a rank, and a child forked beside them can wait for ever for a lock of theirs (seen in Python 3.11.7,
    # once in 5,000 forks, in PyOS_AfterFork_Child): workers come from a process without threads.
    multiprocessing.set_forkserver_preload(["torch.utils.data"])
    context = "forkserver" if workers else None
    data = DataLoader(list(range(SIZE)), 2, shuffle=True, num_workers=workers, multiprocessing_context=context)
    method = Follows()
    run = trainer(method, devices=2, strategy="ddp", max_epochs=3)
    run.fit(Lit(), data)
    return [list(pair) for pair in method.pairs]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_record_their_own_samples(workers: int) -> None:
    ranks = run_ddp(f"{__file__}:follow_on_rank", {"workers": workers})
    for pairs in ranks:
        assert len(pairs) == 3 * 6
        assert all(recorded == real for recorded, real in pairs)
    for epoch in range(3):
        dealt = [index for pairs in ranks for recorded, _ in pairs[6 * epoch : 6 * epoch + 6] for index in recorded]
        assert sorted(dealt) == list(range(SIZE))

"""Which loader is the training loader: in every way in which Lightning can be given one, and whoever asks for it first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.utilities import CombinedLoader
from test_sampling import SIZE, Follows, Lit, Validated, assert_followed, loader, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import Lane, Method
from lightning_peft.capture.draws import RecordingBatchSampler
from lightning_peft_plugins.regularizers.pskd import PSKD

torch.set_num_threads(1)


class Scheduled(Method):
    """Asks in the sanity check how long the training is, so that Lightning sets the loader up there."""

    lane = Lane.REPORT

    def start(self, run: Any) -> None:
        self.total = run.total_steps


class Own(Validated):
    """Has its loaders itself."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = self.lr = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=False, batch_size=10)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=False, batch_size=10)


def fit(module: L.LightningModule, *args: Any, before: tuple[Callback, ...] = (), **options: Any) -> Follows:
    """Train with a method that notes samples and one that asks early, and the sanity check on."""
    method, scheduled = Follows(), Scheduled()
    run = trainer(*before, method, scheduled, num_sanity_val_steps=2, **options)
    run.fit(module, *args)
    assert_followed(method, scheduled.total)
    return method


@pytest.mark.parametrize("workers", [0, 1])
def test_beside_a_validation_loader(workers: int) -> None:
    data = loader(num_workers=workers, persistent_workers=workers > 0)
    before = {name: value for name, value in vars(data).items() if name != "_iterator"}
    fit(Validated(), data, loader(shuffle=False, batch_size=10))
    assert {name: value for name, value in vars(data).items() if name != "_iterator"} == before


def test_loaders_of_a_module_and_of_a_datamodule() -> None:
    fit(Own())
    fit(Own(), reload_dataloaders_every_n_epochs=1, max_epochs=3)
    method, scheduled = Follows(), Scheduled()
    trainer(method, scheduled, num_sanity_val_steps=2).fit(Validated(), datamodule=Data())
    assert_followed(method, 12)


@pytest.mark.filterwarnings(
    "ignore:You requested to overfit but enabled", "ignore:Your `val_dataloader`'s sampler has shuffling"
)
@pytest.mark.parametrize("options", [{"limit_train_batches": 3}, {"overfit_batches": 2}, {"max_steps": 7, "max_epochs": -1}])
def test_limits(options: dict[str, Any]) -> None:
    fit(Validated(), loader(), loader(batch_size=10), **options)


def test_a_combined_loader_of_one() -> None:
    class Unpacks(Validated):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["a"] if isinstance(batch, dict) else batch

    fit(Unpacks(), CombinedLoader({"a": loader()}), loader(shuffle=False))


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_batch_size_finder(tmp_path: Path) -> None:
    module = Own()
    fit(module, before=(BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=2),), default_root_dir=tmp_path)
    assert module.batch_size == 8


def test_learning_rate_finder(tmp_path: Path) -> None:
    module = Own()
    module.lr = 1e-4
    fit(
        module,
        before=(LearningRateFinder(num_training_steps=4, min_lr=1e-6, max_lr=1e-4, early_stop_threshold=None),),
        default_root_dir=tmp_path,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_callback_that_asks_in_its_setup_before_anybody_listens(workers: int) -> None:
    class Asks(Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            self.total = trainer.estimated_stepping_batches

    data = loader(num_workers=workers)
    fit(Validated(), data, loader(shuffle=False), before=(Asks(),))
    assert not isinstance(data.batch_sampler, RecordingBatchSampler)


def test_nothing_is_kept_of_a_loader_that_failed() -> None:
    class Fails(Callback):
        def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise RuntimeError("mine")

    data = loader()
    before = dict(vars(data))
    with pytest.raises(RuntimeError, match="mine"):
        fit(Validated(), data, loader(shuffle=False), before=(Fails(),))
    assert vars(data) == before


class Classifier(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Batches:
    """Batches made beforehand, in a container that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, SIZE, 4):
            index = torch.arange(first, min(first + 4, SIZE))
            yield index[:, None].float(), index % 2, index


def test_what_is_no_loader_is_refused_and_the_cure_works() -> None:
    with pytest.raises(MisconfigurationException, match=r'is a Batches, whose sample order.*sample_index="<key or position>"'):
        trainer(PSKD()).fit(Classifier(), Batches())
    method = PSKD(sample_index="2")
    trainer(method).fit(Classifier(), Batches())
    assert method.memory is not None
    assert method.memory.seen.nonzero().numel() == SIZE

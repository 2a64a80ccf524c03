"""Test-time adaptation of a network whose parameters two processes share, or its refusal with the way out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_toys import shard
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft
from lightning_peft import LAME, T3A, BatchNormAdapt, LoRA, Tent
from lightning_peft.testing.adaptation import answers, built
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import trainer
from lightning_peft.testing.pictures import BatchNormPictures, picture_loader
from lightning_peft.testing.trace import difference
from lightning_peft.weights.shards import is_shard, whole

ADAPTED = {
    "BatchNormAdapt": lambda **more: BatchNormAdapt(momentum=0.3, **more),
    "T3A": lambda **more: T3A(per_class=4, **more),
    "LAME": lambda **more: LAME(**more),
}
SPOILT = 3  # a sample of the second process alone, in its first batch


class Shards(BatchNormPictures):
    def configure_model(self) -> None:
        if not any(is_shard(parameter) for parameter in self.parameters()):
            shard(self, self.model)


def of_rank(rank: int, *, spoilt: bool = False) -> DataLoader[Any]:
    inputs, labels = picture_loader().dataset.tensors  # type: ignore[attr-defined]
    inputs, labels = inputs[rank::2].clone(), labels[rank::2]
    if spoilt and rank:
        inputs[SPOILT] = torch.nan
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def in_shards(module: Any, methods: list[Any], verb: str = "test", **settings: Any) -> list[Tensor]:
    sizes, data = settings.pop("sizes", (2, 1)), settings.pop("data", None) or of_rank(int(os.environ["RANK"]))
    shared = {"devices": 2, "strategy": ModelParallelStrategy(*sizes), "use_distributed_sampler": False}
    return answers(module, methods, verb, data, **shared, **settings)


def refusal(methods: list[Any], **settings: Any) -> str:
    try:
        in_shards(built(Shards), methods, **settings)
    except MisconfigurationException as error:
        return str(error)
    return "nothing was refused"


def on_rank(folder: str) -> dict[str, Any]:
    rank, found = int(os.environ["RANK"]), dict[str, Any]()
    for name, method in ADAPTED.items():
        found[name] = {verb: in_shards(built(Shards), [method()], verb) for verb in ("test", "validate", "predict")}
        found[name]["beside others"] = in_shards(built(Shards), [LoRA(2, targets=["model.8"], exclude=()), method()])
        found[name]["spoilt"] = in_shards(built(Shards), [method()], data=of_rank(rank, spoilt=True))
        if name != "LAME":
            kept = built(Shards)
            in_shards(kept, [method(keep=True)])
            found[name]["kept"] = {key: whole(tensor) for key, tensor in kept.state_dict().items()}
    found["refused"] = refusal([Tent()])
    found["split"] = refusal([LAME()], sizes=(1, 2))
    shared = {"devices": 2, "strategy": ModelParallelStrategy(2, 1), "use_distributed_sampler": False}
    fitted, methods = built(Shards), [LoRA(2, targets=["model.8"], exclude=(), checkpoint="full")]
    runner = trainer(callbacks=[*methods, every_epoch(Path(folder))], **shared)
    runner.fit(fitted, of_rank(rank), of_rank(rank))
    found["after a fit"] = in_shards(fitted, [T3A()])
    return found


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("verb", ["test", "validate", "predict", "beside others", "spoilt"])
def test_each_process_adapts_to_its_own_samples_as_it_does_alone(ranks: list[dict[str, Any]], name: str, verb: str) -> None:
    for rank, found in enumerate(ranks):
        data = of_rank(rank, spoilt=verb == "spoilt")
        alone = answers(built(BatchNormPictures), [ADAPTED[name]()], data=data)
        plain = answers(built(BatchNormPictures), [], data=data)
        assert difference(plain, alone) is not None
        for own, shared in zip(alone, found[name][verb], strict=True):
            torch.testing.assert_close(own, shared, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["BatchNormAdapt", "T3A"])
def test_what_is_kept_is_what_one_process_keeps(ranks: list[dict[str, Any]], name: str) -> None:
    alone = built(BatchNormPictures)
    answers(alone, [ADAPTED[name](keep=True)], data=of_rank(0))
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(ranks[0][name]["kept"][key], value, rtol=0, atol=1e-5)
    assert difference(dict(alone.state_dict()), dict(built(BatchNormPictures).state_dict())) is not None


def test_who_runs_the_network_as_often_as_its_samples_ask_is_refused(ranks: list[dict[str, Any]], folder: Path) -> None:
    for rank in ranks:
        with pytest.raises(MisconfigurationException, match=r"tent does not work under the fsdp2.*load_from_checkpoint makes"):
            raise MisconfigurationException(rank["refused"])
    loaded = lightning_peft.load_from_checkpoint(BatchNormPictures, folder / "epoch=0.ckpt")
    plain = answers(loaded, [], data=of_rank(0))
    assert difference(plain, answers(loaded, [Tent(lr=0.05)], data=of_rank(0))) is not None


def test_a_folder_holds_the_statistics_of_the_first_process(ranks: list[dict[str, Any]], folder: Path) -> None:
    loaded = lightning_peft.load_from_checkpoint(BatchNormPictures, folder / "epoch=0.ckpt")
    own = answers(loaded, [T3A()], data=of_rank(0))
    for alone, shared in zip(own, ranks[0]["after a fit"], strict=True):
        torch.testing.assert_close(alone, shared, rtol=0, atol=1e-5)


def test_layers_that_are_split_are_refused_in_an_evaluation_too(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        with pytest.raises(MisconfigurationException, match=r"data_parallel_size=2, tensor_parallel_size=1\)"):
            raise MisconfigurationException(rank["split"])

"""Methods that choose something in the course of a training choose the same in shards, at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from sharded_toys import COURSE, TARGETS, Alone, Made, made, of_rank, spread, weights
from torch import Tensor

from lightning_peft import LIFT, RAMT, SPT, IncreLoRA, SaRA, SpIEL, TemporaryForgetting, TriAdaptLoRA
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import loader, trainer
from lightning_peft.testing.trace import difference
from lightning_peft.weights.detach import attachments
from lightning_peft.weights.maps import maps_of
from lightning_peft.weights.shards import whole
from lightning_peft_plugins.selective._ramt.binary_mask import BinaryMask

# Four optimizer steps an epoch: sums and windows are open when the first one is saved.
METHODS: dict[str, Callable[[], Any]] = {
    "LIFT": lambda: LIFT(rank=2, filter_rank=2, every=3, **TARGETS),
    "SpIEL": lambda: SpIEL(density=0.1, every=6, window=5, rate=0.5, **TARGETS),
    "SaRA": lambda: SaRA(threshold=0.06, nuclear=0.05, reselect=5, **TARGETS),
    "SPT": lambda: SPT(budget=80, rank=1, looks=6, ease=3.0, **TARGETS),
    "IncreLoRA": lambda: IncreLoRA(1, 3, top=1, warmup=0, every=2, **TARGETS),
    "TriAdaptLoRA": lambda: TriAdaptLoRA(1, 4, every=2, **TARGETS),
    "RAMT": lambda: RAMT(dropout=0.9, threshold=-0.03, norm=0.01, temperature=2.0, tune=("head",), **TARGETS),
    "TemporaryForgetting": lambda: TemporaryForgetting(every=5, std=0.1, targets=["model.0"]),
    "layers that begin anew": lambda: TemporaryForgetting(every=5, targets=["model.2"]),
}
OF_A_BATCH = {"IncreLoRA"}
"""Their scores are of each process's batch, so that DDP is what they are held against."""


class Choices(Callback):
    """Notes after every step what maps and parts hold beside their parameters, and what the method says in numbers."""

    def __init__(self, method: Any) -> None:
        self.method, self.found = method, list[dict[str, Any]]()

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        state = {name: value for name, value in pl_module.state_dict().items() if name.endswith("_extra_state")}
        state |= {str(place): each.form.get_extra_state() for place, each in enumerate(self._grown(pl_module))}
        state |= {mapped.name: whole(mask.bits()) for mapped, mask in maps_of(pl_module, BinaryMask, "RAMT")}
        numbers = {name: float(value) for name, value in self.method.metrics(self.method.run).items()}
        self.found.append({"held": {name: _plain(value) for name, value in state.items()}, "numbers": numbers})

    @staticmethod
    def _grown(module: LightningModule) -> list[Any]:
        return [each for each in attachments(module) if hasattr(getattr(each, "form", None), "grown")]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def fit(module: LightningModule, runner: Any, data: Any, **settings: Any) -> None:
    runner.fit(module, data, loader(8), **settings)


def in_shards(name: str, *more: Any, **settings: Any) -> dict[str, Any]:
    module, method = made(Made, "adam"), METHODS[name]()
    choices = Choices(method)
    fit(module, spread(callbacks=[method, choices, *more], max_epochs=3, folders=True, **COURSE), of_rank(64), **settings)
    return {"weights": weights(module), "choices": choices.found}


def beside(name: str, data: Any, **settings: Any) -> dict[str, Any]:
    module, method = made(Alone, "adam"), METHODS[name]()
    choices = Choices(method)
    fit(module, trainer(callbacks=[method, choices], max_epochs=3, **COURSE, **settings), data)
    return {"weights": weights(module), "choices": choices.found}


def on_rank(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in METHODS:
        left = in_shards(name, every_epoch(Path(folder, name)))
        resumed = in_shards(name, ckpt_path=f"{folder}/{name}/epoch=0.ckpt")
        found[name] = {"left": left, "resumed": resumed}
    for name in OF_A_BATCH:
        found[name]["ddp"] = beside(name, of_rank(64), devices=2, strategy="ddp", use_distributed_sampler=False)
    found["others"] = refused(Path(folder, "full"))
    return found


def refused(folder: Path) -> str:
    """What a file of SaRA says to a module that began with other weights, of which others are small."""

    def train(seed: int, *callbacks: Any, **settings: Any) -> None:
        torch.manual_seed(seed)
        sara = SaRA(threshold=0.06, checkpoint="full", **TARGETS)
        fit(Made("adam"), spread(callbacks=[sara, *callbacks], folders=True), of_rank(), **settings)

    train(0, every_epoch(folder))
    try:
        train(1, ckpt_path=folder / "epoch=0.ckpt")
    except MisconfigurationException as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_chosen_is_what_one_process_chooses(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name]["left"] for rank in ranks)
    expected = ranks[0][name]["ddp"] if name in OF_A_BATCH else beside(name, loader(64))
    assert difference(first, second) is None
    assert difference(expected["choices"], first["choices"]) is None
    for key, value in expected["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=1e-12)
    held = [step["held"] for step in first["choices"]]
    assert not held[0] or held[0] != held[-1], "nothing was chosen anew"


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_that_stopped_between_two_choices_goes_on_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        left, resumed = rank[name]["left"], rank[name]["resumed"]
        assert difference(left["weights"], resumed["weights"]) is None
        assert difference(left["choices"][-len(resumed["choices"]) :], resumed["choices"]) is None


def test_a_file_with_another_number_of_small_weights_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        with pytest.raises(MisconfigurationException, match=r"Build the model with the weights that its fit began with"):
            raise MisconfigurationException(rank["others"])

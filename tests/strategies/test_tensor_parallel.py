"""Methods under tensor parallelism, on two processes: each computes with a part of every layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from sharded_toys import COURSE, Alone, made, spread, weights
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD

import lightning_peft
from lightning_peft import PSKD, BitFit, LoRA, MagnitudePruning, NMSparsity, Wanda, WeightCompander
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.trace import difference
from lightning_peft.weights.mapped_layer import MapChain, MappedLayer

ALL: dict[str, Any] = {"targets": ["model.0", "model.2", "model.4"], "exclude": ()}


class Heavy(Alone):
    """Its optimizer keeps a momentum of the gradients as they come."""

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return SGD(parameters, lr=0.05, momentum=0.9)


class Split(Heavy):
    """Splits its layers by outputs, by inputs, and by outputs that do not divide."""

    def configure_model(self) -> None:
        if not isinstance(self.model[0].weight, DTensor):
            by_outputs = ColwiseParallel(output_layouts=Replicate())
            layers = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": by_outputs}
            parallelize_module(self.model, self.mesh(), layers)

    def mesh(self) -> Any:
        return self.device_mesh["tensor_parallel"]  # type: ignore[index]


class Elsewhere(Split):
    """Splits its layers on a mesh of its own."""

    def mesh(self) -> Any:
        return init_device_mesh("cpu", (2,), mesh_dim_names=("mine",))


class SplitNowhere(Heavy):
    def configure_model(self) -> None:
        """Leaves every layer whole."""


class Seen(Callback):
    """Notes whether maps are given parts of weights or whole ones in training."""

    def __init__(self) -> None:
        self.parts: set[bool] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._patch = pytest.MonkeyPatch()
        own, parts = MapChain._mapped, self.parts

        def mapped(chain: MapChain, stored: Any) -> Any:
            parts.add(isinstance(stored, DTensor))
            return own(chain, stored)

        self._patch.setattr(MapChain, "_mapped", mapped)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._patch.undo()


METHODS: dict[str, Callable[[], list[Any]]] = {
    "together": lambda: [
        LoRA(2, alpha=8, **ALL), NMSparsity("2:4", **ALL), WeightCompander(**ALL), PSKD(alpha=0.3)
    ],
    "deltas": lambda: [LoRA(2, alpha=8, **ALL), BitFit()],
    "pruned": lambda: [MagnitudePruning(0.5, **ALL), WeightCompander(**ALL)],
    "cut": lambda: [NMSparsity("4:16", **ALL)],  # of the layer split by inputs, groups lie in both processes
}  # fmt: skip


def split(module: LightningModule, methods: list[Any], resume: str | None = None, **settings: Any) -> Trainer:
    runner = spread(sizes=(1, 2), callbacks=methods, max_epochs=2, **settings)
    runner.fit(module, loader(), loader(8), ckpt_path=resume)
    return runner


def refusal(style: type[Plain], method: Any) -> str:
    with pytest.raises(MisconfigurationException) as refused:
        split(made(style), [method])
    return str(refused.value)


def on_rank(folder: str) -> dict[str, Any]:
    """Everything that is tried in one pair of processes."""
    found: dict[str, Any] = {}
    for name, methods in METHODS.items():
        seen, left = Seen(), made(Split)
        runner = split(left, [*methods(), seen, every_epoch(Path(folder, name))], folders=True, **COURSE)
        again, file = made(Split), made(Split)
        last = every_epoch(Path(folder, f"{name}-file"))
        split(again, [*methods(), last], resume=f"{folder}/{name}/epoch=0.ckpt", **COURSE)
        runner.strategy._save_distributed_checkpoint = False
        runner.save_checkpoint(f"{folder}/{name}.ckpt")
        found[name] = {"left": weights(left), "folder": weights(again), "parts": sorted(seen.parts)}
        found[name]["mapped"] = any(isinstance(layer, MappedLayer) for layer in left.modules())
        (tested,) = runner.test(left, loader(8), verbose=False)
        (read,) = spread(sizes=(1, 2)).test(file, loader(8), ckpt_path=f"{folder}/{name}.ckpt", verbose=False)
        found[name] |= {"losses": [tested, read]}
    found["whole layers"] = refusal(Split, Wanda(0.5, **ALL))
    found["none split"] = refusal(SplitNowhere, BitFit())
    found["elsewhere"] = refusal(Elsewhere, LoRA(2, **ALL))
    return found


@pytest.fixture(scope="module", params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_two_processes_end_as_one_does(ranks: list[dict[str, Any]], name: str) -> None:
    alone = made(Heavy)
    trainer(callbacks=METHODS[name](), max_epochs=2, **COURSE).fit(alone, loader(), loader(8))
    for key, value in weights(alone).items():
        torch.testing.assert_close(ranks[0][name]["left"][key], value, rtol=0, atol=1e-12)


def test_a_resumed_fit_ends_as_one_left_alone_bit_for_bit(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert difference(rank[name]["left"], rank[name]["folder"]) is None
    assert difference(ranks[0][name]["left"], ranks[1][name]["left"]) is None


def test_files_and_folders_are_read_without_tensor_parallelism(
    ranks: list[dict[str, Any]], folder: Path, tmp_path: Path, name: str
) -> None:
    for kind in (name, f"{name}-file"):
        last = folder / kind / "epoch=1.ckpt"
        torch.manual_seed(0)  # it may hold what was trained alone; the class makes the rest
        loaded = lightning_peft.load_from_checkpoint(Heavy, last, optimizer="sgd")
        torch.manual_seed(0)
        base = Heavy("sgd")
        baked = torch.load(lightning_peft.bake_checkpoint(last, tmp_path / f"{kind}.ckpt", base=base), weights_only=True)
        for key, value in ranks[0][name]["left"].items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=1e-12)
            torch.testing.assert_close(baked["state_dict"][key], value, rtol=0, atol=1e-12)


def test_an_ordinary_module_is_left_tested_saved_and_read(ranks: list[dict[str, Any]], name: str) -> None:
    assert not ranks[0][name]["mapped"]
    assert ranks[0][name]["left"].keys() == Plain().state_dict().keys()
    tested, read = ranks[0][name]["losses"]
    assert tested == read


def test_no_weight_is_gathered_for_maps_that_act_on_parts(ranks: list[dict[str, Any]]) -> None:
    parts = {name: ranks[0][name]["parts"] for name in METHODS}
    assert parts == {"together": [True], "deltas": [], "pruned": [True], "cut": [False, True]}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("whole layers", r"wanda acts on whole layers.*data_parallel_size=2, tensor_parallel_size=1\)"),
        ("none split", r"configure_model of SplitNowhere splits none.*tensor_parallel_size=1\)"),
        ("elsewhere", r'Give parallelize_module self.device_mesh\["tensor_parallel"\]'),
    ],
)
def test_refusals_name_the_way_out(ranks: list[dict[str, Any]], case: str, said: str) -> None:
    for rank in ranks:
        assert re.search(said, rank[case])

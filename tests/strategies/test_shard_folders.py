"""Checkpoints of a fit under FSDP2 as folders of shards, which Lightning writes by default."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from sharded_toys import COURSE, TARGETS, Alone, Made, adapted, made, trained, weights
from torch import nn
from torch.distributed.fsdp import fully_shard

import lightning_peft
from lightning_peft import LoRA, NMSparsity
from lightning_peft.baking.reading import read_checkpoint
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import loader, trainer
from lightning_peft.testing.runs import resumable
from lightning_peft.testing.trace import difference

FOLDERS: dict[str, Any] = {"folders": True, **COURSE}


def three() -> list[Any]:
    return [LoRA(2, alpha=8, **TARGETS), NMSparsity("2:4", **TARGETS), lightning_peft.WeightCompander(**TARGETS)]


class Tied(Made):
    """Two layers are one, shared in the one group that there is."""

    def build(self) -> None:
        super().build()
        self.model[2] = nn.Linear(16, 16, bias=False, dtype=torch.float64)
        self.model.insert(3, nn.Linear(16, 16, bias=False, dtype=torch.float64))
        self.model[3].weight = self.model[2].weight

    def configure_model(self) -> None:
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


class FullDisk(Callback):
    """Lets the second save fail in the first process, which the other one hears of."""

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, ""

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if trainer.current_epoch == 1 and trainer.is_global_zero:
                patch.setattr(torch, "save", self.fails)
            try:
                trainer.save_checkpoint(self.path)
            except CheckpointError as error:
                self.said = str(error)

    def fails(self, *_: Any, **__: Any) -> None:
        raise OSError("no space left on device")


class Edits(Callback):
    """Changes a frozen weight, in the second epoch and in the shard of the last process alone."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1 and not trainer.is_global_zero:
            with torch.no_grad():
                pl_module.model[0]._parameters["weight"].to_local().add_(1)


def on_rank(folder: str) -> dict[str, Any]:
    """Everything that is tried in one pair of processes."""
    found: dict[str, Any] = {}
    for name, methods in {"three": three, "adapted": adapted}.items():
        left, _ = trained(made(Made, "adam"), [*methods(), every_epoch(Path(folder, name))], **FOLDERS)
        resumed, _ = trained(made(Made, "adam"), methods(), resume=f"{folder}/{name}/epoch=0.ckpt", **FOLDERS)
        found[name] = {"left": weights(left), "resumed": weights(resumed)}
        trained(made(Made, "adam"), [*methods(), every_epoch(Path(folder, f"{name}-file"))], **COURSE)
    trained(made(Made, "adam"), [*adapted(), Edits(), every_epoch(Path(folder, "edited"))], **FOLDERS)
    for folders in (True, False):
        methods = [NMSparsity("2:4", targets=["model.0"], exclude=()), every_epoch(Path(folder, f"tied-{folders}"))]
        trained(made(Tied, "adam"), methods, folders=folders)
    full = FullDisk(Path(folder, "full.ckpt"))
    trained(made(Made, "adam"), [*adapted(), full], **FOLDERS)
    found["full"] = full.said
    return found


@pytest.mark.parametrize("name", ["three", "adapted"])
def test_a_fit_that_goes_on_from_a_folder_ends_as_one_left_alone_bit_for_bit(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert difference(rank[name]["left"], rank[name]["resumed"]) is None
    assert difference(ranks[0][name]["left"], ranks[1][name]["left"]) is None


@pytest.mark.parametrize("name", ["three", "adapted"])
def test_a_folder_holds_what_the_file_of_the_same_fit_holds(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    spread, file = (resumable(read_checkpoint(folder / kind / "epoch=1.ckpt")) for kind in (name, f"{name}-file"))
    states = [list(each.pop("optimizer_states")[0]["state"].values()) for each in (spread, file)]
    assert difference(spread, file) is None
    assert difference(*states) is None


def test_a_folder_goes_on_without_shards(ranks: list[dict[str, Any]], folder: Path) -> None:
    alone = made(Alone, "adam")
    runner = trainer(callbacks=three(), max_epochs=2, enable_checkpointing=False, **COURSE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        runner.fit(alone, loader(), loader(8), ckpt_path=folder / "three/epoch=0.ckpt", weights_only=True)
    for name, value in ranks[0]["three"]["left"].items():
        torch.testing.assert_close(alone.state_dict()[name], value, rtol=0, atol=1e-12)


def test_a_folder_is_loaded_and_baked_as_a_file_is(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    last = folder / "three/epoch=1.ckpt"
    torch.manual_seed(0)
    base = Alone("adam")
    baked = torch.load(lightning_peft.bake_checkpoint(last, tmp_path / "baked.ckpt", base=base), weights_only=True)
    torch.manual_seed(0)  # the folder holds what was trained; the class makes the rest
    loaded = lightning_peft.load_from_checkpoint(Alone, last, optimizer="adam")
    for name, value in ranks[0]["three"]["left"].items():
        torch.testing.assert_close(baked["state_dict"][name], value, rtol=0, atol=1e-12)
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=1e-12)


def test_a_folder_of_what_was_trained_is_small(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert not read_checkpoint(folder / "adapted/epoch=1.ckpt")["state_dict"].keys() & {"model.0.weight", "model.2.weight"}


def test_a_frozen_weight_that_changed_in_one_shard_is_in_the_folder(ranks: list[dict[str, Any]], folder: Path) -> None:
    first, second = (read_checkpoint(folder / f"edited/epoch={epoch}.ckpt")["state_dict"] for epoch in (0, 1))
    assert "model.0.weight" not in first
    assert "model.0.weight" in second


def test_a_save_that_fails_leaves_the_folder_that_was_there(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert all("no space left on device" in rank["full"] for rank in ranks)
    assert read_checkpoint(folder / "full.ckpt")["epoch"] == 0
    assert [path.name for path in folder.iterdir() if "full" in path.name] == ["full.ckpt"]


@pytest.mark.parametrize("folders", [True, False])
def test_what_layers_share_is_saved_once_and_shared_again(ranks: list[dict[str, Any]], folder: Path, folders: bool) -> None:
    state = read_checkpoint(folder / f"tied-{folders}/epoch=1.ckpt")["state_dict"]
    assert state["model.2.weight"].data_ptr() == state["model.3.weight"].data_ptr()
    assert state["model.0.weight"].view(-1, 4).ne(0).sum(1).max() == 2


@pytest.fixture
def damaged(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "three/epoch=0.ckpt", tmp_path / "damaged"))


def test_a_folder_that_lost_a_shard_is_refused_by_name(damaged: Path) -> None:
    next(damaged.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="distcp"):
        read_checkpoint(damaged)


def calling(named: bytes) -> bytes:
    """A pickle that calls what it names, which may be an attribute of something harmless."""
    module, name = (b"\x8c" + bytes([len(text)]) + text for text in named.split(b":"))
    return b"\x80\x04" + module + name + b"\x93(\x8c\x04boomtR."


@pytest.mark.parametrize("named", [b"builtins:print", b"pathlib:os.system", b"torch.distributed.checkpoint.metadata:os.system"])
def test_nothing_in_a_folder_is_run(damaged: Path, named: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (damaged / ".metadata").write_bytes(calling(named))
    with pytest.raises(CheckpointError, match=r"which does not belong there"):
        read_checkpoint(damaged)
    assert "boom" not in "".join(capfd.readouterr())


def test_a_folder_reads_no_file_outside_of_it(damaged: Path) -> None:
    found = pickle.loads((damaged / ".metadata").read_bytes())
    next(iter(found.storage_data.values())).relative_path = "../secret"
    (damaged / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="secret, which is not in it"):
        read_checkpoint(damaged)


def test_two_folders_that_were_mixed_are_refused(damaged: Path, folder: Path) -> None:
    shutil.copy(folder / "adapted/epoch=0.ckpt/.metadata", damaged)
    for shard in (folder / "adapted/epoch=0.ckpt").glob("*.distcp"):
        shutil.copy(shard, damaged)
    with pytest.raises(CheckpointError, match="files of several checkpoints were mixed"):
        read_checkpoint(damaged)

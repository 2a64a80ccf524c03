"""Methods under FSDP2, on two processes: attached before the module is sharded, or refused with the way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sharded_toys import COURSE, TARGETS, Alone, Made, adapted, made, shard, spread, trained, weights
from torch import nn

import lightning_peft
from lightning_peft import PSKD, BlockPruning, LayerGrowth, LoRA, MixtureGrowth, NMSparsity, WeightCompander
from lightning_peft.testing.modules import Plain, loader, mlp, trainer
from lightning_peft.weights.maps import maps_of
from lightning_peft_plugins.sparsity._nm_sparsity.nm_map import NMMap


class MadeLater(Made):
    """Makes and shards it at once, as networks are that fit into no process."""

    says = True

    def build(self) -> None:
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(0)
            self.model = mlp().double()
            if self.says:
                lightning_peft.attach(self)
            shard(self, self.model)


class MadeInSilence(MadeLater):
    says = False


class MadeInTwo(Made):
    """Makes one more layer when it is sharded."""

    def configure_model(self) -> None:
        self.more = nn.Linear(3, 3)
        super().configure_model()


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except MisconfigurationException as error:
        return str(error)
    return "nothing was refused"


def together() -> list[Any]:
    return [LoRA(2, alpha=8, **TARGETS), NMSparsity("2:4", **TARGETS), WeightCompander(**TARGETS), PSKD(alpha=0.3)]


class Held(Callback):
    """Counts the whole masks that are held between the backward pass and the step."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        maps = [nm_map for _, nm_map in maps_of(pl_module, NMMap, "NMSparsity")]
        self.count = sum(nm_map._of_forward[1] is not None for nm_map in maps)


def on_rank(folder: str) -> dict[str, Any]:
    """Everything that is tried in one pair of processes."""
    found: dict[str, Any] = {}
    init, _ = trained(made(Made), together(), **COURSE)
    later, _ = trained(made(MadeLater), together(), **COURSE)
    found["init"], found["later"] = weights(init), weights(later)
    found["silent"] = refusal(lambda: trained(made(MadeInSilence), together()))
    found["two"] = refusal(lambda: trained(made(MadeInTwo), [LoRA(2, **TARGETS)]))
    found["split"] = refusal(lambda: trained(made(Made), [LoRA(2, **TARGETS)], sizes=(1, 2)))
    found["pruning"] = refusal(lambda: trained(made(Made), [BlockPruning(1)]))
    found["growth"] = refusal(lambda: trained(made(Made), [LayerGrowth(start=2)]))
    found["mixture"] = refusal(lambda: trained(made(Made), [MixtureGrowth(at="step:2")]))
    preset: dict[str, Any] = {"targets": "all-linear", "exclude": ()}
    found["preset"] = refusal(lambda: trained(made(Made), [LoRA(2, **preset), NMSparsity("2:4", **preset)]))
    found["again"] = refusal(lambda: trained(init, [LoRA(2, **TARGETS)]))
    held = Held()
    trained(made(Made), [NMSparsity("2:4", recipe="sr-ste", **TARGETS), held])
    found["held"] = held.count
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    whole_fit, runner = trained(made(Made), [*adapted(), saves])
    resumed, _ = trained(made(Made), adapted(), resume=f"{folder}/epoch=0.ckpt")
    found |= {"whole": weights(whole_fit), "resumed": weights(resumed)}
    found["free"] = [parameter.requires_grad for parameter in whole_fit.parameters()]
    for folders in (True, False):
        (tested,) = runner.test(whole_fit, loader(8), verbose=False)
        path = Path(folder, f"saved-{folders}.ckpt")
        runner.strategy._save_distributed_checkpoint = folders
        runner.save_checkpoint(path)
        read = made(Made)
        (again,) = spread(folders=folders).test(read, loader(8), ckpt_path=path, verbose=False)
        found[f"saved {folders}"] = {"read": weights(read), "losses": [tested, again]}
    return found


def test_three_methods_together_end_as_in_one_process(ranks: list[dict[str, Any]]) -> None:
    alone = made(Alone)
    trainer(callbacks=together(), max_epochs=2, **COURSE).fit(alone, loader(), loader(8))
    for name, value in weights(alone).items():
        torch.testing.assert_close(ranks[0]["init"][name], value, rtol=0, atol=1e-12)
        assert torch.equal(ranks[0]["init"][name], ranks[1]["init"][name])
    kept = ranks[0]["init"]["model.0.weight"].view(-1, 4).ne(0).sum(1)
    assert kept.max() <= 2


def test_one_line_attaches_to_a_network_that_is_made_when_it_is_sharded(ranks: list[dict[str, Any]]) -> None:
    for name, value in ranks[0]["init"].items():
        assert torch.equal(ranks[0]["later"][name], value)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("silent", r"no method was attached to.*call lightning_peft.attach\(self\) in configure_model"),
        ("two", r"made more.weight after the methods were attached"),
        ("split", r"data_parallel_size=2, tensor_parallel_size=1\)"),
        ("pruning", r"block_pruning does not work under the fsdp2 strategy"),
        ("mixture", r"mixture_growth does not work under the fsdp2 strategy.*a fit of its own under one of these"),
        ("growth", r"Shards are laid out before training begins"),
        ("again", r"sharded already.*Build the module anew"),
    ],
)
def test_refusals_name_the_way_out(ranks: list[dict[str, Any]], case: str, said: str) -> None:
    for rank in ranks:
        with pytest.raises(MisconfigurationException, match=said):
            raise MisconfigurationException(rank[case])


def test_what_is_frozen_for_a_fit_is_known_in_shards_and_given_back(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["preset"] == "nothing was refused"
        assert all(rank["free"])


def test_no_process_holds_whole_masks_until_the_step(ranks: list[dict[str, Any]]) -> None:
    alone = Held()
    trainer(callbacks=[NMSparsity("2:4", recipe="sr-ste", **TARGETS), alone], max_epochs=1).fit(
        made(Alone), loader(), loader(8)
    )
    assert [rank["held"] for rank in ranks] == [0, 0]
    assert alone.count == 2


def test_a_resumed_fit_ends_as_one_left_alone_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for name, value in ranks[0]["whole"].items():
        assert torch.equal(ranks[0]["resumed"][name], value)


def test_a_file_goes_on_without_shards_and_loads_as_any_other(ranks: list[dict[str, Any]], folder: Path) -> None:
    alone = made(Alone)
    runner = trainer(callbacks=adapted(), max_epochs=2, enable_checkpointing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        runner.fit(alone, loader(), loader(8), ckpt_path=folder / "epoch=0.ckpt", weights_only=True)
    torch.manual_seed(0)  # the file holds what was trained; the class makes the rest
    loaded = lightning_peft.load_from_checkpoint(Alone, folder / "epoch=1.ckpt", optimizer="sgd")
    for name, value in ranks[0]["whole"].items():
        torch.testing.assert_close(alone.state_dict()[name], value, rtol=0, atol=1e-12)
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=1e-12)
    assert (folder / "epoch=1.ckpt").stat().st_size < 30_000


@pytest.mark.parametrize("folders", [True, False])
def test_the_module_that_is_left_is_tested_saved_and_read(ranks: list[dict[str, Any]], folders: bool) -> None:
    saved = ranks[0][f"saved {folders}"]
    assert saved["read"].keys() == Plain().state_dict().keys()
    for name, value in saved["read"].items():
        assert torch.equal(ranks[0]["whole"][name], value)
    assert saved["losses"][0] == saved["losses"][1]

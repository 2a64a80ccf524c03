"""BlockPruning in training: what leaves, what is left, how it goes on from checkpoints, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_networks import (
    IMAGES,
    NETWORKS,
    Deep,
    Wrapped,
    cut,
    silent,
    train,
    vit,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import deepened, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same, fit
from lightning_peft_plugins.pruning._block_pruning.block_activations import BlockActivations, BlockWatch
from lightning_peft_plugins.pruning.block_pruning import BlockPruning


class TestBlockPruning(MethodTester):
    # Cuts come after the first of three epochs, whose checkpoint a class that knows nothing of cuts loads baked.
    methods = [lambda: BlockPruning(0.5, start="50%", end="75%", every=1, shape="linear")]
    adapted = staticmethod(deepened)
    removed_parts = "blocks leave"


# What leaves.


def test_blocks_that_do_nothing_leave_and_optimizers_let_go() -> None:
    module = silent(1, 2)
    stays = [module.blocks[0], module.blocks[3]]
    run = fit([BlockPruning(2, start=3, every=2)], module=module)
    assert list(module.blocks) == stays
    assert [(edit["sources"], edit["step"]) for edit in journal_of(module)] == [([0, 3], 3)]
    held = {p for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == set(module.parameters())
    assert set(run.trainer.optimizers[0].state) <= held


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_calls_no_block_ranks_none() -> None:
    class Skipping(Deep):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=r"was called.* in the 1 steps before the cut at step 2.*every="):
        fit([BlockPruning(1, start=2, every=1)], style=Skipping)
    assert journal_of(fit([BlockPruning(1, start=2, every=2)], style=Skipping).module), "the advice"


def test_frozen_blocks_stay_unless_they_are_named() -> None:
    def frozen(*places: int) -> Any:
        module = silent(1)
        for place in places:
            module.blocks[place].requires_grad_(False)
        return module

    module = frozen(1)
    silent_one = module.blocks[1]
    fit([BlockPruning(1, start=3)], module=module)
    assert len(module.blocks) == 3
    assert silent_one in list(module.blocks)
    module = frozen(1)
    fit([BlockPruning(1, start=3, targets=["blocks.1"])], module=module)
    assert silent_one not in list(module.blocks)
    with pytest.raises(MisconfigurationException, match=r"only 1 can.*blocks\.1 has frozen weights only"):
        fit([BlockPruning(2, start=3)], module=frozen(0, 1, 2))


def test_cuts_over_time_rank_what_is_left_anew() -> None:
    module = silent(0, 2, blocks=6)
    fit([BlockPruning(3, start=2, end=8, every=2, shape="linear")], module=module, max_epochs=3)
    steps = [(edit["step"], edit["from"], len(edit["sources"])) for edit in journal_of(module)]
    assert steps == [(4, 6, 5), (6, 5, 4), (8, 4, 3)]


def test_targets_and_excludes_follow_their_blocks() -> None:
    module = silent(0, 1, 2, 3)
    fit([BlockPruning(2, start=2, end=4, every=1, targets=["blocks.1", "blocks.3"])], module=module, max_epochs=2)
    sources = [edit["sources"] for edit in journal_of(module)]
    assert sources in ([[0, 1, 2], [0, 2]], [[0, 2, 3], [0, 1]])
    module = silent(0, 1, 2, 3)
    fit([BlockPruning(1, start=2, exclude=["blocks.0", "blocks.1", "blocks.2"])], module=module)
    assert journal_of(module)[0]["sources"] == [0, 1, 2]


def test_ranks_decide_by_what_all_saw() -> None:
    class Both:
        """A strategy of two ranks, the other of which saw twice as much."""

        root_device = torch.device("cpu")

        def reduce(self, table: Tensor, reduce_op: str) -> Tensor:
            return table + table * torch.tensor([4.0, 2.0, 2.0, 2.0, 2.0])

    watch = BlockWatch(lambda: True, lambda: True)
    watch.seen = {"b.0": BlockActivations(torch.tensor(0.5), scored=2, calls=2, links=1)}
    reduced = watch.reduced(["b.0", "b.1"], Both())  # type: ignore[arg-type]
    assert reduced["b.0"].mean() == pytest.approx(2.5 / 6)
    assert reduced["b.0"].why_it_stays() == ""
    assert reduced["b.1"].why_it_stays() == "was not called"
    assert watch.seen["b.0"].scored == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_trunk_is_watched_when_the_window_opens_late() -> None:
    module = silent(1)
    module.blocks.compile(backend="eager")
    fit([BlockPruning(1, start=3, every=1)], module=module)
    torch._dynamo.reset()
    assert journal_of(module)[0]["sources"] == [0, 2, 3]


# What is left.


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_is_the_network_its_class_builds_with_so_many_blocks(name: str, tmp_path: Path) -> None:
    make, depths, inputs, paths = NETWORKS[name]

    def module() -> Wrapped:
        return Wrapped(lambda: make(*depths), inputs)

    torch.manual_seed(0)
    trained = module()
    train(trained, tmp_path)
    assert {edit["path"] for edit in journal_of(trained)} <= set(paths)
    left = [len(trained.get_submodule(path)) for path in paths]
    assert sum(left) == sum(depths[: len(paths)]) - 2
    built = make(*left, *depths[len(paths) :])
    built.load_state_dict(trained.network.state_dict())
    plain = Wrapped(lambda: built, inputs).eval()
    trained.eval()
    assert torch.equal(plain(inputs), trained(inputs))
    if hasattr(built, "config"):
        assert trained.network.config.num_hidden_layers == left[0]
    train(loaded := module(), tmp_path, "epoch=2.ckpt")
    assert torch.equal(loaded.eval()(inputs), trained(inputs))
    runner = trainer(callbacks=[cut(), every_epoch(tmp_path)])
    runner.predict(trained, DataLoader(inputs, 4), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert sum(len(trained.get_submodule(path)) for path in paths) == sum(depths[: len(paths)])  # what left came back


def test_a_removed_block_was_all_that_changed() -> None:
    network = vit(3).eval()
    skipped = copy.deepcopy(network)
    skipped.blocks[1] = nn.Identity()
    from lightning_peft.structure import depth, edits

    change = edits.apply(network, depth.blocks_edit(network, "blocks", [0, 2]))
    assert torch.equal(network(IMAGES), skipped(IMAGES))
    edits.undo(network, change)
    assert len(network.blocks) == 3


# How it goes on.


def cuts(score: str = "influence") -> BlockPruning:
    """Cuts after steps 6 and 8, each seen for two steps."""
    return BlockPruning(2, score, start=4, end=8, every=2, shape="linear")


def check_resume(make: Callable[[], list[Any]], folder: Path, averaged: bool = False, **settings: Any) -> Fit:
    """Train whole, then from the checkpoint of every step: before and between cuts, in the middle of a window, after all."""

    def before() -> list[Any]:
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    settings = {"style": Deep, "max_epochs": 12, "data": loader(8), **settings}  # one step an epoch
    whole = fit(make(), after=[every_epoch(folder)], before=before(), **settings)
    assert [edit["step"] for edit in journal_of(whole.module)] == [6, 8]
    for step in (1, 3, 5, 6, 7, 8, 9, 11):
        path = folder / f"epoch={step - 1}.ckpt"
        resumed = fit(make(), seed=step + 9, resume=path, before=before(), **settings)
        assert_same(whole, resumed, f"uninterrupted against resumed after step {step}")
    return whole


@pytest.mark.parametrize("score", ["influence", "taylor", "magnitude"])
def test_resumes_bit_exactly_from_every_step(score: str, tmp_path: Path) -> None:
    check_resume(lambda: [cuts(score)], tmp_path)


def test_resumes_with_masks_maps_and_averages(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [lightning_peft.NMSparsity("2:4", targets="all-linear", exclude=()), lightning_peft.WeightCompander(), cuts()]

    whole = check_resume(methods, tmp_path, averaged=True)
    loaded = lightning_peft.load_from_checkpoint(Deep, tmp_path / "epoch=11.ckpt")
    assert loaded.state_dict().keys() == whole.module.state_dict().keys()


def test_reset_begins_anew() -> None:
    run = fit([BlockPruning(1, start=2, every=1, optimizer_state="reset")], style=Deep)
    assert {int(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {2}
    run = fit([BlockPruning(1, start=2, every=1)], style=Deep)
    assert {int(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {4}

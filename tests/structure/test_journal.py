"""The journal in checkpoints: what is read back, what is refused, and that refusing loses nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

import lightning_peft
from lightning_peft import LayerGrowth, NMSparsity
from lightning_peft.structure import journal
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.testing.callbacks import FailAt, PlannedError, every_epoch
from lightning_peft.testing.modules import Plain, ResidualBlock, deepened, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same, fit
from lightning_peft.testing.trace import difference
from lightning_peft_plugins.growth import layer_growth

Deep = deepened(Plain)
Short = deepened(Plain, 2)


def grown(**settings: Any) -> Fit:
    """Built with 2 blocks, grown to 4 in the middle of the second epoch."""
    return fit([LayerGrowth(at="step:6", to=4)], style=Short, max_epochs=3, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown")

    class Light(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(path / f"light-epoch={trainer.current_epoch}.ckpt", weights_only=True)

    grown(after=[every_epoch(path), Light()])
    return path


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


PROBE = torch.linspace(-1, 1, 48).view(3, 16)


@pytest.mark.parametrize("file", ["epoch=1.ckpt", "light-epoch=1.ckpt"])
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.parametrize("methods", [list, lambda: [LayerGrowth(at="step:6", to=4)]], ids=["other", "same"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_every_stage_loads_grown_weights(folder: Path, file: str, stage: str, methods: Callable[[], Any]) -> None:
    module = Short()
    # Any method brings the engine with it.
    callbacks = methods() or [NMSparsity("2:4", targets="blocks.0.fc1", exclude=())]
    runner = trainer(callbacks=callbacks)
    getattr(runner, stage)(module, loader(8), ckpt_path=folder / file, **({} if stage == "predict" else {"verbose": False}))
    saved = torch.load(folder / file, weights_only=True)["state_dict"]
    assert len(module.blocks) == 4
    assert difference(dict(saved), values(module)) is None


def test_a_grown_network_goes_back_to_an_earlier_checkpoint(folder: Path) -> None:
    run = grown()
    runner = trainer(callbacks=[LayerGrowth(at="step:6", to=4)])
    with pytest.warns(UserWarning, match="callbacks used to create"):
        runner.test(run.module, loader(8), ckpt_path=folder / "epoch=0.ckpt", verbose=False)
    assert len(run.module.blocks) == 2
    saved = torch.load(folder / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert difference(dict(saved), values(run.module)) is None


def test_training_goes_on_from_an_earlier_checkpoint_in_one_process(folder: Path) -> None:
    run = grown()
    again = fit([LayerGrowth(at="step:6", to=4)], module=run.module, resume=folder / "epoch=0.ckpt", max_epochs=3)
    assert_same(grown(), again, "uninterrupted against rewound and resumed")


def test_a_network_built_large_takes_grown_weights(folder: Path) -> None:
    loaded = lightning_peft.load_from_checkpoint(Deep, folder / "epoch=2.ckpt")
    small = lightning_peft.load_from_checkpoint(Short, folder / "epoch=2.ckpt")
    assert torch.equal(loaded.eval()(PROBE), small.eval()(PROBE))
    assert type(small) is Short


def test_baked_files_load_without_this_library(folder: Path, tmp_path: Path) -> None:
    lightning_peft.bake_checkpoint(folder / "epoch=2.ckpt", tmp_path / "baked.ckpt")
    plain = Deep.load_from_checkpoint(tmp_path / "baked.ckpt", weights_only=True)
    again = lightning_peft.load_from_checkpoint(Short, tmp_path / "baked.ckpt")
    assert torch.equal(plain.eval()(PROBE), again.eval()(PROBE))


def test_a_second_fit_goes_on_with_the_grown_network(tmp_path: Path) -> None:
    first = grown()
    second = fit([LayerGrowth(at="step:2", to=5)], module=first.module, after=[every_epoch(tmp_path)])
    assert len(second.module.blocks) == 5
    loaded = lightning_peft.load_from_checkpoint(Short, tmp_path / "epoch=0.ckpt")
    assert torch.equal(loaded.eval()(PROBE), second.module.eval()(PROBE))


def test_a_failure_leaves_what_was_trained() -> None:
    module = Short()
    with pytest.raises(PlannedError):
        fit([LayerGrowth(at="step:2", to=4)], module=module, after=[FailAt(3)])
    assert len(module.blocks) == 4


def tampered(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    checkpoint = torch.load(folder / "epoch=1.ckpt", weights_only=True)
    change(checkpoint[KEY])
    torch.save(checkpoint, tmp_path / "tampered.ckpt")
    return tmp_path / "tampered.ckpt"


def edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: section["journal"]["edits"][0].__setitem__(key, value)


TAMPERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "version": (lambda section: section["journal"].__setitem__("version", 99), "format 99.*reads format 1"),
    "no list": (lambda section: section["journal"].__setitem__("edits", "rm -rf"), "'edits' must be a list"),
    "no dict": (lambda section: section.__setitem__("journal", 3), "format None"),
    "operation": (edit("op", "exec"), "operation 'exec', which this version"),
    "path": (edit("path", "blocks.0.fc1"), "is a Linear; blocks are changed in a ModuleList"),
    "nowhere": (edit("path", "__class__"), "has no submodule '__class__'"),
    "sources": (edit("sources", [0, 7]), r"names blocks \[0, 7\] of 2"),
    "no sources": (edit("sources", None), "malformed: it needs 'path'"),
    "count": (edit("from", 3), "made on 3 blocks of ResidualBlock.*has 2"),
    "class": (edit("block", ["Other:00000000"]), r"made on 2 blocks of Other \(shapes 00000000\)"),
    "rates": (edit("rates", {"drop": [2.0] * 4}), "'rates' must hold a rate a block"),
}


@pytest.mark.parametrize("what", TAMPERS)
def test_what_does_not_fit_is_refused_before_a_weight_is_touched(folder: Path, tmp_path: Path, what: str) -> None:
    change, message = TAMPERS[what]
    path = tampered(folder, tmp_path, change)
    module = Short()
    before = values(module)
    with pytest.raises(CheckpointError, match=message):
        trainer(callbacks=[LayerGrowth(at="step:6", to=4)]).test(module, loader(8), ckpt_path=path, verbose=False)
    assert difference(before, values(module)) is None
    with pytest.raises(CheckpointError, match=message):
        lightning_peft.load_from_checkpoint(Short, path)


def test_groups_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tampered(folder, tmp_path, lambda section: section.__setitem__("groups", [["blocks"]]))
    with pytest.raises(CheckpointError, match="must list names by optimizer and group"):
        grown(resume=path)


def test_another_class_is_refused(folder: Path) -> None:
    class Wide(Short):  # type: ignore[misc,valid-type]
        def build(self) -> None:
            super().build()
            self.blocks = nn.Sequential(*(nn.Sequential(ResidualBlock(), nn.Linear(16, 16)) for _ in range(2)))

    with pytest.raises(CheckpointError, match=r"made on 2 blocks of ResidualBlock.*has 2 of Sequential"):
        lightning_peft.load_from_checkpoint(Wide, folder / "epoch=1.ckpt")


def test_a_trained_network_survives_a_file_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    run = grown()
    before = values(run.module)
    path = tampered(folder, tmp_path, edit("sources", [0, 7]))
    with pytest.raises(CheckpointError):
        trainer(callbacks=[LayerGrowth(at="step:6", to=4)]).test(run.module, loader(8), ckpt_path=path, verbose=False)
    assert difference(before, values(run.module)) is None
    assert len(journal.journal_of(run.module)) == 1


def test_resuming_without_the_method_goes_on_with_the_grown_network(folder: Path) -> None:
    resumed = fit([NMSparsity("2:4", targets="model.2", exclude=())], style=Short, max_epochs=1)
    assert len(resumed.module.blocks) == 2  # nothing here grows by itself
    with pytest.raises(Exception, match=r"weight maps|cannot be resumed"):
        fit([NMSparsity("2:4", targets="model.2", exclude=())], style=Short, max_epochs=3, resume=folder / "epoch=1.ckpt")


def test_a_conflict_of_other_methods_leaves_the_module_as_built() -> None:
    module = Deep()
    before = values(module)
    blocks = list(module.blocks)
    masks = [NMSparsity("2:4", targets="blocks.0.fc1", exclude=(), name=name) for name in ("one", "two")]
    with pytest.raises(MisconfigurationException, match="both put a mask"):
        fit([LayerGrowth(at="step:2", start=2), *masks], module=module)
    with pytest.raises(MisconfigurationException, match="cannot grow"):
        fit([LayerGrowth(at="step:2", to=2)], module=module)
    assert all(now is then for now, then in zip(module.blocks, blocks, strict=True))
    assert difference(before, values(module)) is None
    assert journal.journal_of(module) == []


def test_an_edit_is_all_or_nothing() -> None:
    module = Short()
    what = blocks_edit(module, "blocks", [0, 1, 0])
    before = values(module)
    broken = copy.deepcopy(what) | {"from": 5}
    with pytest.raises(CheckpointError):
        journal.edit(module, broken)
    assert journal.journal_of(module) == []
    journal.edit(module, what)
    journal.take_back(module)
    assert journal.journal_of(module) == []
    assert difference(before, values(module)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": 2}, "has 2 blocks by then and cannot grow to=2"),
        ({"to": [4, 3], "at": ["step:1", "step:2"]}, "has 4 blocks by then and cannot grow to=3"),
        ({"to": 4, "start": 3}, "start=3: blocks has 2 blocks"),
        ({"to": 4, "blocks": "model.nothing"}, r"not a list of blocks.*'blocks' \(2 blocks\)"),
        ({"to": 4, "operator": "zero", "outputs": ["fc9"]}, r"outputs=\['fc9'\] are no layers of ResidualBlock"),
    ],
)
def test_sizes_and_names_are_checked_before_anything_is_touched(arguments: dict[str, Any], message: str) -> None:
    module = Short()
    before = values(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit([LayerGrowth(**{"at": "step:2", **arguments})], module=module)
    assert difference(before, values(module)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Say what to grow to"),
        ({"to": [3, 4]}, "names 1 events and to= 2 sizes"),
        ({"to": 4, "at": "tomorrow"}, "not a moment of training"),
        ({"to": 4, "operator": "stak"}, "Did you mean stack"),
        ({"to": 4, "optimizer_state": "keep"}, "reset, copy, pad"),
        ({"to": 4, "lr": "warm"}, "is not a rule"),
        ({"to": 4, "follow": "all"}, "follow='.*' is unknown; choose one of new, none"),
        ({"to": 0}, "positive number of depth"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        LayerGrowth(**arguments)


def loads_as(module: Any, folder: Path, blocks: int) -> None:
    """A checkpoint that a Trainer without methods writes of a module is enough to build it again."""
    runner = trainer(max_epochs=1)
    runner.fit(module, loader(), loader(8))
    for light in (True, False):
        runner.save_checkpoint(folder / "plain.ckpt", weights_only=light)
        again = lightning_peft.load_from_checkpoint(Short, folder / "plain.ckpt")
        assert len(again.blocks) == blocks
        assert difference(values(module), values(again)) is None


@pytest.mark.parametrize("light", [True, False], ids=["weights", "whole"])
def test_a_checkpoint_saved_after_the_fit_knows_what_was_grown(light: bool, tmp_path: Path) -> None:
    run = grown()
    run.trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=light)
    assert len(lightning_peft.load_from_checkpoint(Short, tmp_path / "after.ckpt").blocks) == 4


def test_a_grown_module_says_so_whoever_saves_it(folder: Path, tmp_path: Path) -> None:
    module = grown().module
    twin = copy.deepcopy(module)
    loads_as(module, tmp_path, 4)
    loads_as(twin, tmp_path, 4)
    loads_as(lightning_peft.load_from_checkpoint(Short, folder / "epoch=1.ckpt"), tmp_path, 4)
    loads_as(Short(), tmp_path, 2)


def test_training_resumes_from_a_file_of_a_trainer_without_methods(tmp_path: Path) -> None:
    module = grown().module
    runner = trainer(max_epochs=1)
    runner.fit(module, loader(), loader(8))
    runner.save_checkpoint(tmp_path / "plain.ckpt")
    resumed = fit([LayerGrowth(at="step:2", to=6)], style=Short, max_epochs=2, resume=tmp_path / "plain.ckpt")
    assert len(resumed.module.blocks) == 6


class Named(Short):
    """A class that pickle finds."""


def test_a_pickled_module_needs_nothing_of_this_library() -> None:
    module = fit([LayerGrowth(at="step:6", to=4)], style=Named, max_epochs=3).module
    assert "on_save_checkpoint" in vars(module)
    data = pickle.dumps(module)
    assert b"lightning_peft.attaching" not in data
    again = pickle.loads(data)
    assert difference(values(module), values(again)) is None


def test_a_grown_network_trains_on_with_what_grew_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(layer_growth, "rank_zero_info", said.append)
    used = LayerGrowth(at="step:2", start=2, lr="rewarm:3")
    module = fit([used], style=Deep).module
    for method in (used, LayerGrowth(at="step:2", start=2, lr="rewarm:3")):
        said.clear()
        fit([method], module=module)
        assert "has been grown before" in "".join(said)
        assert (method.done, method.changed_at, method.lr_factor(), len(module.blocks)) == (1, None, 1.0, 4)


def test_a_training_that_ended_before_it_grew_grows_in_the_next() -> None:
    module = fit([LayerGrowth(at="step:9", start=2)], style=Deep).module
    assert len(module.blocks) == 2
    fit([LayerGrowth(at="step:2", start=2)], module=module)
    assert len(module.blocks) == 4


def test_sizes_are_held_against_the_tensors_of_the_file_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(folder / "epoch=2.ckpt", weights_only=True)
    (grow,) = checkpoint[KEY]["journal"]["edits"]
    grow["sources"], grow["rates"] = [0] * 10**4, {}
    torch.save(checkpoint, tmp_path / "huge.ckpt")
    with pytest.raises(CheckpointError, match="leads to 10000 blocks of blocks, but the file holds tensors of 4") as refused:
        lightning_peft.load_from_checkpoint(Short, tmp_path / "huge.ckpt")
    assert len(str(refused.value)) < 300

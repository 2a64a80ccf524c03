from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import lightning_peft
from lightning_peft import PERP, LayerGrowth, bake, bake_checkpoint, load_from_checkpoint
from lightning_peft.baking.bake import baked, read_checkpoint
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import STYLES, Plain, deepened, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyGate, ToyScale, ToyThreshold
from lightning_peft.testing.trace import difference


def methods():
    return [ToyScale(), ToyThreshold(0.2), ToyEntropy()]


class WithHyperparameters(Plain):
    def __init__(self, width=16, optimizer="adam"):
        self.width = None
        super().__init__(optimizer)
        self.save_hyperparameters()

    def build(self):
        super().build()


def test_an_ordinary_module_is_returned_as_it_is():
    layer = nn.Linear(2, 2)
    weight = layer.weight
    assert bake(layer) is layer
    assert layer.weight is weight


def test_baking_twice_changes_nothing():
    module = fit(methods()).module
    weights = copy.deepcopy(module.state_dict())
    assert difference(dict(weights), dict(bake(bake(module)).state_dict())) is None


class Versioned(nn.Linear):
    """Reads a file only when that says which version of the class wrote it, as MNASNet of torchvision does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class WithVersions(Plain):
    def build(self):
        super().build()
        self.model[0] = Versioned(16, 16)


@pytest.mark.parametrize(
    "made", [methods, lambda: [LayerGrowth(at="step:2", start=2)], list], ids=["maps", "structure", "no method"]
)
def test_files_say_which_version_of_a_class_wrote_them(made, tmp_path):
    run = fit(made(), style=deepened(WithVersions), after=[every_epoch(tmp_path)])
    path = bake_checkpoint(tmp_path / "epoch=0.ckpt", tmp_path / "baked.ckpt")
    for file in (tmp_path / "epoch=0.ckpt", path):
        loaded = load_from_checkpoint(type(run.module), file)
        assert difference(dict(run.module.state_dict()), dict(loaded.state_dict())) is None


TRAININGS = {
    "maps": methods,
    "structure": lambda: [LayerGrowth(at="step:2", start=2)],
    "parts": lambda: [*methods(), ToyGate()],
    "partial": lambda: [PERP(("bias",), rank=2, checkpoint="trained")],
    "no method": list,
}


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
@pytest.mark.parametrize("kind", TRAININGS)
def test_trainings_go_on_from_files_that_say_versions(kind, tmp_path):
    made = TRAININGS[kind]

    def train(**settings):
        return fit(made(), style=deepened(WithVersions), max_epochs=2, **settings)

    whole = train(after=[every_epoch(tmp_path)])
    resumed = train(resume=tmp_path / "epoch=0.ckpt")
    assert difference(dict(whole.module.state_dict()), dict(resumed.module.state_dict())) is None
    for callbacks in () if kind == "partial" else (made(), []):  # a partial file needs the base it was trained on
        module = type(whole.module)()
        trainer(callbacks=callbacks).predict(module, loader(8), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_file_and_module_agree_in_every_style(style, tmp_path):
    run = fit(methods(), style=style, after=[every_epoch(tmp_path)])
    path = tmp_path / "epoch=0.ckpt"
    loaded = load_from_checkpoint(style, path)
    assert all(type(a) is type(b) for a, b in zip(loaded.modules(), run.module.modules(), strict=True))
    state = baked(read_checkpoint(path))["state_dict"]
    assert difference(dict(run.module.state_dict()), dict(loaded.state_dict())) is None
    assert difference(dict(sorted(run.module.state_dict().items())), dict(sorted(state.items()))) is None
    assert any((value == 0).any() for name, value in state.items() if name.endswith("weight"))


def test_a_baked_file_loads_where_this_library_is_not_installed(tmp_path):
    run = fit(methods(), after=[every_epoch(tmp_path)])
    bake_checkpoint(tmp_path / "epoch=0.ckpt", tmp_path / "baked.ckpt")
    torch.save(run.module.state_dict(), tmp_path / "wanted.pt")
    script = f"""
import sys
sys.modules["lightning_peft"] = None  # importing it now fails
import torch
from torch import nn
state = torch.load({str(tmp_path / "baked.ckpt")!r}, weights_only=True)["state_dict"]
net = nn.ModuleDict({{"model": nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))}})
net.load_state_dict(state, strict=True)
wanted = torch.load({str(tmp_path / "wanted.pt")!r}, weights_only=True)
assert all(torch.equal(wanted[name], value) for name, value in net.state_dict().items())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_baked_file_says_what_was_done_and_cannot_be_resumed_by_accident(tmp_path):
    fit(methods(), after=[every_epoch(tmp_path)])
    bake_checkpoint(tmp_path / "epoch=0.ckpt", tmp_path / "baked.ckpt")
    checkpoint = torch.load(tmp_path / "baked.ckpt", weights_only=True)
    assert {"optimizer_states", "callbacks", "loops", "lr_schedulers"}.isdisjoint(checkpoint)
    assert checkpoint["lightning_peft"]["weights"] == {}
    assert [item["method"] for item in checkpoint["lightning_peft"]["methods"]] == ["ToyScale", "ToyThreshold", "ToyEntropy"]
    assert checkpoint["lightning_peft"]["methods"][1]["config"]["threshold"] == 0.2
    again = load_from_checkpoint(Plain, tmp_path / "baked.ckpt")
    assert list(again.state_dict()) == list(Plain().state_dict())


def test_a_baked_file_is_a_fresh_start_for_other_methods(tmp_path):
    fit(methods(), after=[every_epoch(tmp_path)])
    module = load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt")
    again = fit([ToyThreshold(0.3)], module=module, data=loader(16))
    assert (again.module.model[0].weight == 0).any()


def test_hyperparameters_survive(tmp_path):
    run = fit(methods(), style=WithHyperparameters, module=WithHyperparameters(width=7), after=[every_epoch(tmp_path)])
    loaded = load_from_checkpoint(WithHyperparameters, tmp_path / "epoch=0.ckpt")
    assert loaded.hparams["width"] == 7
    assert difference(dict(run.module.state_dict()), dict(loaded.state_dict())) is None


def test_arguments_reach_the_users_class(tmp_path):
    fit([], after=[every_epoch(tmp_path)])
    assert load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt", optimizer="sgd").kind == "sgd"
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        load_from_checkpoint(STYLES[1], tmp_path / "epoch=0.ckpt")
    with pytest.warns(UserWarning, match="Found keys that are"):
        load_from_checkpoint(STYLES[1], tmp_path / "epoch=0.ckpt", strict=False)


def test_a_failed_bake_leaves_no_file(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"nothing")
    with pytest.raises(lightning_peft.structure.checkpoint.CheckpointError):
        bake_checkpoint(tmp_path / "bad.ckpt", tmp_path / "out.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.ckpt"]


def test_bake_in_place_over_the_source(tmp_path):
    run = fit(methods(), after=[every_epoch(tmp_path)])
    path = tmp_path / "epoch=0.ckpt"
    assert bake_checkpoint(path, path) == path
    loaded = Plain.load_from_checkpoint(path, weights_only=True)
    assert difference(dict(run.module.state_dict()), dict(loaded.state_dict())) is None

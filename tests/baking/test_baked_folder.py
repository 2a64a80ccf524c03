"""A folder gives back what was saved, or says what is wrong with it and touches nothing."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from export_toys import Deep, Text, Tied, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import NMSparsity, load_baked, save_baked
from lightning_peft.baking import baked_folder
from lightning_peft.baking.manifest import json_data, read_manifest
from lightning_peft.structure import journal
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.trace import difference


def values(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_baked(trained("conv")[0], tmp_path / "net")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("kind", "cls"), [("grown", Deep), ("text", Text), ("tied", Tied)])
def test_a_module_comes_back_bit_for_bit(kind: str, cls: type, tmp_path) -> None:
    module, _ = trained(kind)
    path = save_baked(module, tmp_path / "net")
    fresh = cls()
    found = load_baked(fresh, path)
    assert difference(dict(module.state_dict()), dict(fresh.state_dict())) is None
    assert list(fresh.state_dict()) == list(module.state_dict())
    assert journal.journal_of(fresh) == journal.journal_of(module)
    assert bool(found["journal"]) == (kind == "grown")
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["net"]
    if kind == "tied":
        assert found["tied"] == {"model.lm_head.weight": "model.transformer.wte.weight"}
        assert fresh.model.lm_head.weight is fresh.model.transformer.wte.weight


def test_the_manifest_tells_what_was_done_and_what_is_there(folder: Path) -> None:
    module, _ = trained("conv")
    found = json.loads((folder / "manifest.json").read_text())
    assert found["made_with"]["torch"] == torch.__version__
    (method,) = found["methods"]
    assert (method["method"], method["config"]["pattern"], method["steps"]) == ("NMSparsity", "2:4", 8)
    weight = module.state_dict()["model.6.weight"]
    entry = found["tensors"]["model.6.weight"]
    assert entry == {
        "dtype": "float32",
        "shape": [16, 128],
        "nonzeros": 16 * 64,
        "sha256": hashlib.sha256(weight.numpy().tobytes()).hexdigest(),
    }
    content = (folder / "model.safetensors").read_bytes()
    assert found["file"] == {
        "name": "model.safetensors",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    (folder.parent / "other").touch()
    assert modes == {stat.S_IMODE((folder.parent / "other").stat().st_mode)}


def test_a_checkpoint_and_the_module_make_the_same_folder(tmp_path) -> None:
    run = fit([NMSparsity("2:4", targets=["model.0"], exclude=())], after=[every_epoch(tmp_path)])
    a, b = save_baked(tmp_path / "epoch=0.ckpt", tmp_path / "a"), save_baked(run.module, tmp_path / "b")
    one, other = read_manifest(a), read_manifest(b)
    assert one["tensors"] == other["tensors"]
    assert one["methods"] == other["methods"]
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_a_grown_checkpoint_keeps_its_journal_in_json(tmp_path) -> None:
    module, _ = trained("grown")
    module.trainer.save_checkpoint(tmp_path / "grown.ckpt")
    found = read_manifest(save_baked(tmp_path / "grown.ckpt", tmp_path / "net"))
    assert journal.read(found) == journal.journal_of(module)
    fresh = Deep()
    load_baked(fresh, tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(torch.ones(2, 16)), module.eval()(torch.ones(2, 16)))


def test_an_ordinary_network_needs_no_lightning(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    found = read_manifest(save_baked(net, tmp_path / "net"))
    assert found["methods"] == []
    assert found["tensors"]["0.weight"]["dtype"] == "bfloat16"
    other = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    load_baked(other, tmp_path / "net")
    assert difference(dict(net.state_dict()), dict(other.state_dict())) is None


def test_views_of_one_tensor_are_saved_as_their_own(tmp_path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(6.0)
            self.register_buffer("left", whole[:3])
            self.register_buffer("right", whole[2:])
            self.register_buffer("turned", whole.view(2, 3).t())
            self.register_buffer("empty", torch.zeros(0))

    module = Views()
    load_baked(fresh := Views(), save_baked(module, tmp_path / "net"))
    assert difference(dict(module.state_dict()), dict(fresh.state_dict())) is None


def test_a_folder_in_use_is_left_alone(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(MisconfigurationException, match="is in use"):
        save_baked(Plain(), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    (tmp_path / "net").mkdir()
    monkeypatch.setattr(baked_folder, "manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_baked(Plain(), tmp_path / "net")
    assert [(path.name, list(path.iterdir())) for path in tmp_path.iterdir()] == [("net", [])]


def test_what_is_no_tensor_is_refused(tmp_path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="_extra_state, a dict"):
        save_baked(Extra(2, 2), tmp_path / "net")


def swap(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.6.bias"] = tensors["model.6.bias"] + 1
    save_file(tensors, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    edit(folder, file={"sha256": hashlib.sha256(content).hexdigest()})


def retell(folder: Path, **changes: Any) -> None:
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    edit(folder, tensors=tensors | {"model.6.bias": tensors["model.6.bias"] | changes})


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    edit(folder, file={"sha256": hashlib.sha256(b"\xff" * 64).hexdigest()})


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


DAMAGE = {
    "truncated": (truncate, "its sha256 is not"),
    "other values": (swap, r"does not hold model\.6\.bias .* sha256 differ"),
    "other shape": (lambda folder: retell(folder, shape=[4]), "shape differ"),
    "other type": (lambda folder: retell(folder, dtype="float16"), "dtype differ"),
    "no safetensors": (no_safetensors, "not a readable safetensors"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "not a JSON"),
    "nested": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "not a JSON"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "not a manifest"),
    "of the future": (lambda folder: edit(folder, format=99), "format 99"),
    "a name too few": (lambda folder: edit(folder, tensors={}), "name other tensors"),
    "no records": (lambda folder: edit(folder, tensors={"a": 1}), '"tensors" is not'),
    "tied to nothing": (lambda folder: edit(folder, tied={"a": "b"}), "ties tensors to b"),
    "journal": (
        lambda folder: edit(folder, journal={"version": 1, "edits": [{"op": "x"}]}),
        "journal .* malformed",
    ),
    "journal of the future": (lambda folder: edit(folder, journal={"version": 7}), "format 7"),
    "journal of no dict": (lambda folder: edit(folder, journal=[]), '"journal" is not'),
    "a name of no tensor": (lambda folder: edit(folder, tied={"model.99.bias": "model.6.bias"}), r"have model\.99\.bias"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_module_stays_as_it_was(damage: str, folder: Path) -> None:
    from lightning_peft.testing.modules import Conv

    make, reason = DAMAGE[damage]
    make(folder)
    module = Conv()
    before = values(module)
    with pytest.raises(CheckpointError, match=reason):
        load_baked(module, folder)
    assert difference(before, values(module)) is None


def test_a_manifest_cannot_name_another_file(folder: Path, tmp_path) -> None:
    (folder / "model.safetensors").replace(tmp_path / "elsewhere")
    found = read_manifest(folder)["file"]
    edit(folder, file=found | {"name": "../elsewhere"})
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_baked(Plain(), folder)
    with pytest.raises(FileNotFoundError, match="not all of it"):
        load_baked(Plain(), tmp_path)


def test_a_module_that_does_not_fit_stays_as_it_was(tmp_path) -> None:
    folder = save_baked(trained("grown")[0], tmp_path / "net")
    module = Deep()
    module.extra = nn.Linear(2, 2)
    before, blocks = values(module), len(module.blocks)
    with pytest.raises(CheckpointError, match=r"lack extra\.weight, extra\.bias"):
        load_baked(module, folder)
    assert len(module.blocks) == blocks
    assert difference(before, values(module)) is None
    assert not journal.journal_of(module)
    load_baked(module, folder, strict=False)
    assert len(module.blocks) == len(trained("grown")[0].blocks)


def test_types_and_weight_maps_are_looked_at(folder: Path, tmp_path) -> None:
    from lightning_peft.testing.modules import Conv

    with pytest.raises(CheckpointError, match=r"module\.to\(torch\.float32\)"):
        load_baked(Conv().half(), folder)
    load_baked(half := Conv().half(), folder, strict=False)
    assert torch.equal(half.model[6].bias, trained("conv")[0].model[6].bias.half())

    module = Plain()
    method = NMSparsity("2:4", targets=["model.0"], exclude=())
    method.attach(module)
    with pytest.raises(MisconfigurationException, match="under weight maps"):
        load_baked(module, save_baked(Plain(), tmp_path / "plain"))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
@settings(max_examples=60)
def test_everything_becomes_json(value: Any) -> None:
    data = json_data(value)
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(baked_folder, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"lightning-peft\[export\]"):
        save_baked(Plain(), tmp_path / "net")

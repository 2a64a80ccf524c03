"""`export` and `report --before`: from a checkpoint and its recipe to files that run elsewhere, and to figures."""

from __future__ import annotations

import json

import pytest
import torch
from cli_toys import ToyData, ToyModule
from loading_lines import loaded

from lightning_peft.baking.baked_folder import load_baked


@pytest.fixture
def checkpoint(cli, toy, tmp_path):
    """A checkpoint with maps, beside the dense one of the same recipe."""
    assert cli("run", toy, "--out", tmp_path / "out", "--trainer.max_epochs", "1")[0] == 0
    return tmp_path / "out" / "model.ckpt"


def test_every_form_is_the_baked_network(cli, toy, checkpoint, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = ToyData().data.tensors[0][:5]
    baked = ToyModule.load_from_checkpoint(checkpoint.with_name("baked.ckpt"), weights_only=True).eval()
    wanted = baked.model(inputs).detach()

    status, data, error = cli("export", checkpoint, "--to", "onnx", "--recipe", toy, "--json")
    assert status == 0, error
    assert data["target"] == str(checkpoint.with_name("model.onnx"))
    session = onnxruntime.InferenceSession(data["target"], providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)

    status, shown, error = cli("export", checkpoint, "--to", "exported", "--recipe", toy, "-o", tmp_path / "a" / "net.pt2")
    assert status == 0, error
    assert "compared with eager" in shown
    assert torch.equal(torch.export.load(tmp_path / "a" / "net.pt2").module()(inputs), wanted)

    status, data, error = cli("export", checkpoint, "--to", "safetensors", "--json")  # the file alone is enough
    assert status == 0, error
    fresh = ToyModule()
    assert [method["method"] for method in load_baked(fresh, data["target"])["methods"]] == ["ToyMask", "ToyTerm"]
    assert torch.equal(fresh.eval().model(inputs), wanted)


def test_the_printed_lines_load_what_bake_and_safetensors_wrote(cli, checkpoint, tmp_path) -> None:
    wanted = torch.load(checkpoint.with_name("baked.ckpt"), weights_only=True)["state_dict"]
    made = [json.loads(checkpoint.with_name("report.json").read_text())]  # its lines say where the class is
    made.append(cli("bake", "out/model.ckpt", "--json")[1])
    made.append(cli("export", "out/model.ckpt", "--to", "safetensors", "-o", "deep/er", "--json")[1])
    assert all("from cli_toys import ToyModule" in data["loading"] for data in made)
    assert not any("lightning_peft" in line for line in made[1]["loading"])
    for found in loaded(tmp_path, *made):
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_two_checkpoints_are_measured_on_the_recipes_test_data(cli, toy, checkpoint, tmp_path) -> None:
    dense = checkpoint.parent / "dense" / "model.ckpt"
    status, data, error = cli("report", checkpoint, "--before", dense, "--recipe", toy, "--json")
    assert status == 0, error
    tested = json.loads((checkpoint.parent / "report.json").read_text())
    assert data["quality"]["after"]["accuracy"] == pytest.approx(tested["composed"]["metrics"]["test/accuracy"], abs=1e-6)
    assert data["quality"]["before"]["accuracy"] == pytest.approx(tested["dense"]["metrics"]["test/accuracy"], abs=1e-6)
    assert data["predicted_speedup"] == 1
    assert data["after"]["nonzero"] == tested["composed"]["nonzero"]
    assert (checkpoint.with_name("model-deployment") / "report.html").is_file()
    assert "no difference is predicted" in cli("report", checkpoint, "--before", dense, "--recipe", toy)[1]


def test_what_is_missing_is_named(cli, toy, tmp_path, capsys) -> None:
    checkpoint = tmp_path / "model.ckpt"
    torch.save({"state_dict": ToyModule().state_dict()}, checkpoint)
    assert "--recipe RECIPE" in cli("export", checkpoint, "--to", "onnx")[2]
    assert "--recipe RECIPE" in cli("report", checkpoint, "--before", checkpoint)[2]
    assert "--before CKPT" in cli("report", checkpoint, "--recipe", toy)[2]
    assert "There is no file" in cli("export", checkpoint.with_name("mdel.ckpt"), "--to", "onnx", "--recipe", toy)[2]
    assert "--recipe is for onnx and exported" in cli("export", checkpoint, "--to", "safetensors", "--recipe", toy)[2]
    assert "shape" in cli("export", checkpoint, "--to", "exported", "--recipe", toy, "--model.width", "8")[2]
    with pytest.raises(SystemExit, match="2"):
        cli("report", checkpoint, "--model.width", "8")
    assert "does not know --model.width" in capsys.readouterr().err

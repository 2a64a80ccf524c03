"""What is merged beside whole models: adapters of PEFT, checkpoints of runs with methods, networks that grew."""

from __future__ import annotations

import json
from collections import Counter

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lightning_peft
from lightning_peft import PERP, LayerGrowth, LoRA, NMSparsity, WeightCompander, merge
from lightning_peft.baking.bake import baked, read_checkpoint
from lightning_peft.cli.main import main
from lightning_peft.deltas.form import Form
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model
from lightning_peft.merging.opening import open_model
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, deepened
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyLowRank, ToyScale, ToyThreshold, ToyTuning


class Net(nn.Module):
    """A layer of each kind that has adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.kernel = nn.Embedding(9, 6), nn.Conv2d(3, 4, 3)
        self.wide, self.square, self.first = nn.Linear(6, 4), nn.Linear(6, 6), Conv1D(5, 6)
        self.gpt, self.head = Conv1D(6, 6), nn.Linear(6, 3)


def adapter(folder, config, seed=1):
    """Save an adapter with random values; return the state dict that PEFT merges it to."""
    net = peft.get_peft_model(Net(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.requires_grad and "magnitude" not in name:
                value.add_(torch.randn_like(value) / 4)
            elif value.requires_grad:
                value.mul_(1 + torch.rand_like(value))
    net.save_pretrained(str(folder))
    return net.merge_and_unload().state_dict()


CONFIGS = {
    "linear layers": lambda: peft.LoraConfig(r=2, lora_alpha=3, target_modules=["wide", "square"]),
    "a scale of the root": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["wide"]),
    "directions and lengths": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["wide", "square"]),
    "a table": lambda: peft.LoraConfig(r=2, target_modules=["table", "wide"]),
    "a kernel": lambda: peft.LoraConfig(r=2, target_modules=["kernel"]),
    "layers of GPT": lambda: peft.LoraConfig(r=2, fan_in_fan_out=True, target_modules=["first", "gpt"]),
    "GPT's and a linear one": lambda: peft.LoraConfig(r=2, fan_in_fan_out=True, target_modules=["wide", "gpt"]),
    "a head and biases": lambda: peft.LoraConfig(r=2, target_modules=["wide"], modules_to_save=["head"], bias="all"),
    "ranks of their own": lambda: peft.LoraConfig(
        r=2, target_modules=["wide", "square"], rank_pattern={"wide": 3}, alpha_pattern={"wide": 5}
    ),
    "no thin product": lambda: peft.MissConfig(r=3, target_modules=["wide", "square"]),
    "shared bases": lambda: peft.RandLoraConfig(r=2, target_modules=["square"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_an_adapter_is_the_model_that_peft_merges(kind, tmp_path):
    expected = adapter(tmp_path / "adapter", CONFIGS[kind]())
    base = open_model(Net().state_dict(), "the base")
    found = open_model(tmp_path / "adapter", base=base)
    assert list(found.tensors) == list(expected)
    assert any(not torch.equal(found.value(name), base.value(name)) for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(found.value(name), value, atol=1e-6, rtol=1e-5, msg=name)


def test_adapters_are_merged_as_differences(tmp_path):
    one, two = (adapter(tmp_path / str(seed), CONFIGS["a head and biases"](), seed) for seed in (1, 2))
    start = Net().state_dict()
    for method, more in (("soup", {}), ("ties", {"base": start}), ("task_arithmetic", {"base": start, "scale": 0.4})):
        expected = merge([one, two], method, **more)
        found = merge([tmp_path / "1", tmp_path / "2"], method, **{"base": start, **more})
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_weight_with_a_delta_is_computed_once_for_all_its_pieces_and_held_alone(tmp_path, monkeypatch):
    adapter(tmp_path / "adapter", CONFIGS["linear layers"]())
    calls: Counter[int] = Counter()
    compute = Form.on_weight
    monkeypatch.setattr(Form, "on_weight", lambda self, weight: calls.update([id(self)]) or compute(self, weight))
    monkeypatch.setattr("lightning_peft.merging.stacks.PIECE", 7)
    start = Net().state_dict()
    base = open_model(start, "the base")
    models = [open_model(tmp_path / "adapter", base=base) for _ in range(2)]
    merge(models, "task_arithmetic", base=base)
    assert sorted(calls.values()) == [1, 1, 1, 1]
    assert all(len(model._latest) == 1 for model in models)
    merge(models, "ties", base=base)
    assert max(calls.values()) < 10, "a look at all tensors computes each once"


def test_the_network_may_stand_in_a_module(tmp_path):
    expected = adapter(tmp_path / "adapter", CONFIGS["a head and biases"]())
    inside = {f"net.{name}": value for name, value in Net().state_dict().items()}
    start = {**inside, "other.weight": torch.ones(2)}
    found = merge([tmp_path / "adapter"], "task_arithmetic", base=start)
    assert list(found) == list(start)
    torch.testing.assert_close(found["net.wide.weight"], expected["wide.weight"])
    torch.testing.assert_close(found["net.head.weight"], expected["head.weight"])
    twice = {**inside, **{f"teacher.{name}": value for name, value in Net().state_dict().items()}}
    with pytest.raises(MergeError, match=r"fits two networks of the base: 'net\.' and 'teacher\.'"):
        merge([tmp_path / "adapter"], "task_arithmetic", base=twice)


def test_an_adapter_and_a_whole_model_are_merged(tmp_path):
    one = adapter(tmp_path / "adapter", CONFIGS["linear layers"]())
    two = {name: value + 1 for name, value in Net().state_dict().items()}
    found = merge([tmp_path / "adapter", two], base=Net().state_dict())
    torch.testing.assert_close(found["wide.weight"], (one["wide.weight"] + two["wide.weight"]) / 2)


def test_a_weight_of_half_precision_is_not_rounded_before_it_is_merged(tmp_path):
    adapter(tmp_path / "adapter", CONFIGS["linear layers"]())
    start = {name: value.bfloat16() for name, value in Net().state_dict().items()}
    found = open_model(tmp_path / "adapter", base=open_model(start, "the base"))
    value = found.value("wide.weight")
    assert value.dtype == torch.float32
    assert not torch.equal(value, value.bfloat16().float())
    assert merge([tmp_path / "adapter"], "task_arithmetic", base=start)["wide.weight"].dtype == torch.bfloat16


def test_an_adapter_of_another_model_or_without_one_is_refused(tmp_path, monkeypatch, capsys):
    adapter(tmp_path / "adapter", CONFIGS["linear layers"]())
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "adapter", "adapter"]) == 2
    error = capsys.readouterr().err
    assert "adapter is an adapter" in error
    assert "(on the command line: --base)" in error
    with pytest.raises(MergeError, match=r"has an adapter of wide\.weight, which the base does not have"):
        merge([tmp_path / "adapter"], "ties", base={"square.weight": torch.ones(6, 6)})
    start = Net().state_dict()
    with pytest.raises(Exception, match="have shapes"):
        merge([tmp_path / "adapter"], "ties", base={**start, "wide.weight": torch.ones(9, 9)})
    adapter(tmp_path / "headed", CONFIGS["a head and biases"]())
    with pytest.raises(Exception, match=r"holds head.*the base has no such parameter"):
        merge([tmp_path / "headed"], "ties", base={name: value for name, value in start.items() if "head" not in name})
    path = tmp_path / "headed/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not ("head" in name and "weight" in name)}, path)
    with pytest.raises(Exception, match=r"names 'head' among modules_to_save, and its file lacks head\.weight"):
        merge([tmp_path / "headed"], "ties", base=start)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(Exception, match="'PROMPT_TUNING'; this library reads"):
        merge([tmp_path / "adapter"], "ties", base=start)


def test_adapters_on_a_folder_become_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    save_file(Net().state_dict(), "base/model.safetensors")
    (tmp_path / "base/config.json").write_text("{}")
    expected = adapter(tmp_path / "adapter", CONFIGS["linear layers"]())
    assert main(["merge", "adapter", "--base", "base", "--method", "task_arithmetic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "merged"
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["config.json", "model.safetensors"]
    torch.testing.assert_close(open_model(tmp_path / "merged").tensors["wide.weight"], expected["wide.weight"])


class Small(ToyTuning):
    """Biases alone, in the file too."""

    checkpoint = "trained"


RUNS = {
    "masks and a compander": lambda: [NMSparsity("2:4", targets="all-linear"), WeightCompander()],
    "a threshold": lambda: [ToyThreshold()],
    "parts": lambda: [ToyLowRank()],
    "a low-rank delta": lambda: [LoRA(rank=2, exclude=None, checkpoint="full")],
    "biases alone": lambda: [Small()],
    "biases alone and a threshold": lambda: [Small(), ToyThreshold()],
    "biases alone under a reparametrisation": lambda: [Small(), ToyScale(targets=["model.0"])],
    "biases alone beside parts": lambda: [Small(), ToyLowRank()],
    "a low-rank delta alone": lambda: [LoRA(rank=2, exclude=None, checkpoint="trained")],
    "retrained biases": lambda: [PERP(("bias",), rank=2, exclude=(), checkpoint="trained")],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of a training under way, by the names of :data:`RUNS`, made when they are asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(kind):
        if kind not in made:
            own = folder / str(len(made))
            fit(RUNS[kind](), max_epochs=1, after=[every_epoch(own)])
            made[kind] = own / "epoch=0.ckpt"
        return made[kind]

    return run


def start():
    """What all runs begin with."""
    torch.manual_seed(0)
    return Plain().state_dict()


@pytest.mark.parametrize("kind", RUNS)
def test_a_checkpoint_of_a_run_is_baked_weight_by_weight(kind, runs):
    path, before = runs(kind), start()
    expected = baked(read_checkpoint(path), before)
    found = open_model(path, base=open_model(before, "the base"))
    assert {key: found.rest[key] for key in expected if key != "state_dict"} == dict(found.rest)
    assert set(found.tensors) == set(expected["state_dict"])
    assert list(found.tensors) == list(before), "in the order of the module"
    assert any(not torch.equal(found.value(name), before[name]) for name in before), "it was trained"
    for name, value in expected["state_dict"].items():
        assert torch.equal(found.value(name), value), name
    again = merge([path], "task_arithmetic", base=before)
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-6, msg=name)


def test_a_checkpoint_of_trained_tensors_needs_its_own_base(runs):
    path = runs("biases alone")
    with pytest.raises(MergeError, match=r"holds only what was trained, not model.*\(on the command line: --base\)"):
        merge([path, path])
    other = {name: value + 1 for name, value in start().items()}
    with pytest.raises(CheckpointError, match="another base"):
        merge([path], "ties", base=other)
    with pytest.raises(CheckpointError, match="is not in this model"):
        merge([path], "ties", base={"model.0.bias": other["model.0.bias"]})


def test_an_edited_weight_is_refused(runs, tmp_path):
    found = torch.load(runs("masks and a compander"), weights_only=True)
    found["state_dict"]["model.0.weight"] += 1
    torch.save(found, tmp_path / "edited.ckpt")
    with pytest.raises(CheckpointError, match="was changed in the file"):
        open_model(tmp_path / "edited.ckpt")


def test_nothing_of_a_base_is_held_for_each_model(runs):
    base = open_model(start(), "the base")
    found = open_model(runs("biases alone"), base=base)
    assert found.tensors["model.2.weight"].data_ptr() == base.tensors["model.2.weight"].data_ptr()


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Two networks that grew alike, one that grew otherwise, and one that did not."""
    folder = tmp_path_factory.mktemp("grown")
    for name, seed, to in (("one", 0, 4), ("two", 1, 4), ("other", 0, 3), ("none", 0, None)):
        methods = [LayerGrowth(at="step:2", to=to)] if to else []
        done = fit(methods, style=deepened(Plain, 2), max_epochs=1, seed=seed)
        done.trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


def test_networks_that_grew_alike_are_merged_and_others_named(grown):
    paths = {name: grown / f"{name}.ckpt" for name in ("one", "two", "other", "none")}
    assert merge([paths["one"], paths["two"]], out=grown / "merged.ckpt")
    lightning_peft.load_from_checkpoint(deepened(Plain, 2), grown / "merged.ckpt")
    with pytest.raises(MergeError, match=r"one\.ckpt went through 1 structural change in.*other\.ckpt.* of another kind"):
        merge([paths["one"], paths["other"]])
    with pytest.raises(MergeError, match=r"none\.ckpt went through no structural change.*give that as the base too"):
        merge([paths["one"]], "ties", base=paths["none"])


def test_a_model_that_is_open_is_merged_as_it_is():
    one = Model("mine", {"w": torch.ones(2)}, computed={"w": lambda: torch.full((2,), 3.0)})
    assert merge([one, {"w": torch.ones(2)}])["w"].tolist() == [2.0, 2.0]

"""Configurations of mergekit: its numbers, whose values are recorded, and no word of them passed over."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from official_values import values_of
from safetensors.torch import load_file, save_file

from lightning_peft import merge
from lightning_peft.cli.main import main
from lightning_peft.merging import mergekit_file, mergekit_functions
from lightning_peft.merging.errors import MergeError

CASES = values_of("mergekit")["cases"]
OPTIONS = {"normalize": "normalize", "rescale": "rescale", "lam": "lambda", "int8": "int8_mask"}


def sines(count):
    """Values that no generator of random numbers has a say in."""
    flat = torch.sin(torch.arange(count * 35, dtype=torch.float64) * 1.7 + 0.3)
    return flat.view(count, 5, 7).float()


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A base and five models in folders."""
    monkeypatch.chdir(tmp_path)
    for name, value in zip(("base", "1", "2", "3", "4", "5"), sines(6), strict=True):
        (tmp_path / name).mkdir()
        save_file({"w": value.clone()}, f"{name}/model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"of": name}))
    return tmp_path


def written(folder, method="ties", models=2, entries=None, **more):
    """Write a configuration."""
    entries = entries or [{"model": str(place), "parameters": {"weight": 1.0}} for place in range(1, models + 1)]
    config = {"merge_method": method, "models": entries, **more}
    if method != "linear":
        config.setdefault("base_model", "base")
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{len(case['weight'])}")
@pytest.mark.parametrize("piece", [1 << 19, 11])
def test_tensors_are_mergekits_bit_for_bit(case, piece, folders, monkeypatch):
    for module in ("mergekit_functions", "stacks"):
        monkeypatch.setattr(f"lightning_peft.merging.{module}.PIECE", piece)
    own = [{"weight": weight} for weight in case["weight"]]
    for entry, density in zip(own, case.get("density", ()), strict=False):
        entry["density"] = density
    entries = [{"model": str(place), "parameters": each} for place, each in enumerate(own, 1)]
    parameters = {name: case[key] for key, name in OPTIONS.items() if key in case}
    if case["method"] != "linear":
        entries.insert(0, {"model": "base"})
    path = written(folders, case["method"], entries=entries, parameters=parameters, dtype="float32")
    found = merge(**mergekit_file.read(path))["w"]
    assert torch.equal(found, torch.tensor(case["merged"]).view(5, 7))


def test_the_largest_stay_and_of_equal_ones_the_first(monkeypatch):
    monkeypatch.setattr(mergekit_functions, "PIECE", 3)
    values = torch.tensor([1.0, -2.0, 1.0, 3.0, -1.0, 1.0, 0.5, 0.0])
    expected = values.clone()
    expected[values.abs().argsort(descending=True, stable=True)[4:]] = 0
    mergekit_functions.keep_largest_(values, 0.5)
    assert values.tolist() == expected.tolist() == [1.0, -2.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0]


def test_what_is_dropped_at_random_keeps_the_sum_of_magnitudes(folders):
    entries = [{"model": "1", "parameters": {"weight": 1.0, "density": 0.5}}]
    path = written(folders, "dare_linear", entries=entries)
    start, model = load_file("base/model.safetensors")["w"], load_file("1/model.safetensors")["w"]
    found = merge(**mergekit_file.read(path))["w"] - start
    kept = found.abs() > 1e-6
    assert 5 < int(kept.sum()) < 30
    assert float(found.abs().sum()) == pytest.approx(float((model - start).abs().sum()), rel=1e-5)
    plain = written(folders, "dare_linear", entries=entries, parameters={"rescale": False})
    torch.testing.assert_close(merge(**mergekit_file.read(plain))["w"], torch.where(kept, model, start))


def test_dare_elects_a_sign_where_it_is_told_to(folders):
    entries = [{"model": str(place), "parameters": {"weight": 1.0, "density": 1.0}} for place in (1, 2)]
    paths = (written(folders, f"dare_{kind}", entries=entries) for kind in ("ties", "linear"))
    elected, summed = (merge(**mergekit_file.read(path))["w"] for path in paths)
    start, *models = (load_file(f"{name}/model.safetensors")["w"] for name in ("base", "1", "2"))
    one, two = (model - start for model in models)
    agree = one * two > 0
    torch.testing.assert_close(summed, start + one + two)
    torch.testing.assert_close(elected[agree], summed[agree])
    torch.testing.assert_close(elected[~agree], (start + torch.where(one.abs() > two.abs(), one, two))[~agree])


def test_parameters_for_all_models_and_for_one(folders):
    entries = [{"model": "1"}, {"model": "2", "parameters": {"weight": 3, "density": 0.5}}]
    found = mergekit_file.read(written(folders, entries=entries, parameters={"weight": 0.5, "density": 0.2, "lambda": 2}))
    assert (found["weight"], found["density"], found["lambda_"]) == ((0.5, 3.0), (0.2, 0.5), 2.0)
    assert found["normalize"] is True
    assert found["rescale"] is False
    assert mergekit_file.read(written(folders))["density"] == (1.0, 1.0)


def test_the_type_is_the_one_that_is_written(folders):
    assert merge(**mergekit_file.read(written(folders, dtype="bfloat16")))["w"].dtype == torch.bfloat16
    both = mergekit_file.read(written(folders, dtype="float32", out_dtype="float16"))
    assert merge(**both)["w"].dtype == torch.float16


FAULTS = {
    "another method": ({"method": "slerp"}, "the method 'slerp' is not read here, but linear, task_arithmetic, ties"),
    "slices": ({"slices": []}, "'slices' is not read here: layers of one model beside those of another"),
    "a tokenizer": ({"tokenizer_source": "union"}, "'tokenizer_source' is not read here"),
    "an unknown key": ({"modell": 1}, "'modell' is not read here. It takes merge_method, models"),
    "a gradient": ({"parameters": {"density": [0.1, 0.5]}}, "'density' is a gradient or a filter"),
    "a filter": ({"parameters": {"weight": [{"filter": "mlp", "value": 1}]}}, "'weight' is a gradient or a filter"),
    "what is not honoured": ({"parameters": {"gamma": 0.1}}, "'gamma' says nothing to ties"),
    "what a method does not look at": (
        {"method": "task_arithmetic", "parameters": {"density": 0.5}},
        "'density' says nothing to task_arithmetic",
    ),
    "for all, of one": (
        {"entries": [{"model": "1", "parameters": {"weight": 1, "normalize": True}}]},
        "'normalize' says nothing to ties, for one model",
    ),
    "a word": ({"parameters": {"weight": "much"}}, "'weight' is 'much', and takes a number"),
    "a flag": ({"parameters": {"normalize": "yes, please"}}, "takes true or false"),
    "no base": ({"base_model": None}, "merges differences to a base"),
    "a base of numbers": ({"base_model": 3}, "base_model is 3, no folder"),
    "a base of linear": ({"method": "linear", "base_model": "base"}, "base_model is none of the models"),
    "no weight": ({"entries": [{"model": "1"}]}, "1 has no weight"),
    "no model": ({"entries": [{"model": "base"}]}, "there is no list of models"),
    "a model twice": (
        {"entries": [{"model": "1", "parameters": {"weight": 1}}] * 2},
        "1 is listed twice",
    ),
    "a name on a hub": (
        {"entries": [{"model": "org/name", "parameters": {"weight": 1}}]},
        "'org/name' is no folder here. Fetch the model",
    ),
    "a layer range": ({"entries": [{"model": "1", "layer_range": [0, 3]}]}, "each takes model, a folder, and parameters"),
    "a density of nothing": ({"parameters": {"density": 0.01}}, "leaves nothing of a tensor of shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_honoured_is_refused(fault, folders):
    config, message = FAULTS[fault]
    with pytest.raises(MergeError) as raised:
        merge(**_read(folders, config))
    assert message in str(raised.value)


def _read(folders, config):
    if "base_model" in config and config["base_model"] is None:
        path = written(folders, base_model="base")
        path.write_text(path.read_text().replace("base_model: base\n", ""))
        return mergekit_file.read(path)
    return mergekit_file.read(written(folders, **config))


@pytest.mark.parametrize("text", ["{", "- 1", "", "merge_method: ties\n"])
def test_a_damaged_file_is_refused(text, folders):
    (folders / "config.yml").write_text(text)
    with pytest.raises(MergeError, match=r"config\.yml"):
        mergekit_file.read(folders / "config.yml")


def test_the_command_takes_a_configuration(folders, capsys):
    path = written(folders, entries=[{"model": str(place)} for place in (1, 2)], parameters={"weight": 1, "density": 0.5})
    assert main(["merge", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["method"] == "ties of mergekit"
    assert data["options"]["density"] == [0.5, 0.5]
    assert [row["role"] for row in data["models"]] == ["base", "model 1", "model 2", "merged"]
    assert data["target"] == str(folders / "merged")
    assert json.loads((folders / "merged/config.json").read_text()) == {"of": "base"}
    assert load_file("merged/model.safetensors")["w"].equal(merge(**mergekit_file.read(path))["w"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yml", "1"], "names its models. Give it alone."),
        (["config.yml", "--method", "ties"], "--method is chosen in config.yml"),
        (["config.yml", "--per-tensor"], "--per-tensor is chosen in config.yml"),
        (["config.yml", "--option", "density=1"], "--option is chosen in config.yml"),
        (["none.yml"], "There is no file none.yml"),
    ],
)
def test_what_a_configuration_says_is_not_said_twice(arguments, message, folders, capsys):
    written(folders)
    assert main(["merge", *arguments]) == 2
    assert message in capsys.readouterr().err

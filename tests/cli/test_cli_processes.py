"""Recipes whose Trainer asks for several processes: as in one, or ended in one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time

import pytest
import torch
from warm_ranks import start_warm

from lightning_peft.cli import processes

TWO = ("--trainer.devices", "2")
SHARDS = (
    *TWO,
    *("--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"),
    *("--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1"),
    *("--trainer.strategy.save_distributed_checkpoint", "false"),
)
METHODS = """\
    - class_path: lightning_peft.NMSparsity
      init_args: {targets: all-linear, exclude: []}
    - class_path: lightning_peft.LoRA
      init_args: {rank: 1, targets: all-linear, exclude: []}
"""


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """A shell starts what it puts into the background deaf to Ctrl-C; ranks find the toys, and take a thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def sharded(toy):
    """Path of a recipe with methods that work on shards, on data in one order."""
    head, _, tail = toy.read_text().partition("    - class_path: cli_toys.ToyMask\n")
    tail = tail.partition("model:\n")[2].replace("ToyModule", "ShardedModule")
    toy.write_text(head + METHODS + "model:\n" + tail + "  init_args: {shuffle: false}\n")
    return toy


@pytest.fixture
def warm(monkeypatch):
    """Start processes that have imported torch and Lightning."""
    monkeypatch.setattr(processes, "_start", start_warm)


def states(*folders):
    return [torch.load(folder / "baked.ckpt", weights_only=True)["state_dict"] for folder in folders]


def test_two_processes_that_share_a_network_end_as_one_does(cli, sharded, tmp_path) -> None:
    start = ("run", sharded, "--no-baseline", "--json")
    status, alone, error = cli(*start, "--out", tmp_path / "alone")
    assert status == 0, error
    status, both, error = cli(*start, "--out", tmp_path / "both", *SHARDS, "--data.batch", "8")
    assert status == 0, error
    assert "composed epoch 3/3" in error, "the first process is heard, and beside the document"
    one, two = alone["composed"], both["composed"]
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    for same in ("steps", "epochs", "parameters", "nonzero", "plan", "methods"):
        assert two[same] == one[same]
    assert one["flops"] / 2 <= two["flops"] < one["flops"] * 0.6, "of one process; what acts on weights does not halve"
    assert [row["norm"] for row in two["learnt"]["rows"]] == pytest.approx([row["norm"] for row in one["learnt"]["rows"]], 1e-4)
    assert len(two["learnt"]["rows"]) == 2
    assert torch.tensor(two["calibration"]).allclose(torch.tensor(one["calibration"]), atol=1e-5)
    assert {name: pair[0] for name, pair in two["calibration_errors"].items()} == pytest.approx(
        {name: pair[0] for name, pair in one["calibration_errors"].items()}, abs=1e-4
    )
    assert both["loading"]
    assert "lightning_peft" not in both["loading"][-1]
    first, second = states(tmp_path / "alone", tmp_path / "both")
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first | second)


def test_a_run_whose_process_dies_or_that_is_stopped_goes_on_from_its_last_epoch(cli, warm, toy, tmp_path, monkeypatch) -> None:
    start = ("run", toy, "--no-baseline", *TWO, "--model", "cli_toys.NoisyModule")
    assert cli(*start, "--out", tmp_path / "whole")[0] == 0
    monkeypatch.setenv("TOY_KILL_AT", "3")  # in the middle of the second of three epochs
    monkeypatch.setenv("TOY_RANK", "1")
    begun = time.monotonic()
    status, _, error = cli(*start, "--out", tmp_path / "killed")
    assert time.monotonic() - begun < 200  # gloo alone would wait for half an hour
    assert status == 2
    assert error.splitlines()[-1].startswith("error: Process 1 of 2 was ended by SIGKILL, as a system")
    monkeypatch.setenv("TOY_KILL_AT", "5")
    monkeypatch.setenv("TOY_SIGNAL", "SIGINT")
    monkeypatch.setenv("TOY_COMMAND", str(os.getpid()))
    status, _, error = cli(*start, "--out", tmp_path / "killed", "--resume")
    assert status == 130, error
    line = error.splitlines()[-1]
    assert line.startswith("interrupted. Continue with: lightning-peft run ")
    monkeypatch.delenv("TOY_KILL_AT")
    assert cli(*shlex.split(line.partition("lightning-peft ")[2]))[0] == 0
    whole, killed = states(tmp_path / "whole", tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole | killed)
    reports = [json.loads((tmp_path / folder / "report.json").read_text())["composed"] for folder in ("whole", "killed")]
    assert reports[0]["metrics"] == reports[1]["metrics"]


def test_an_error_in_one_process_ends_the_command_with_its_message(cli, warm, toy, monkeypatch) -> None:
    monkeypatch.setenv("TOY_KILL_AT", "1")
    monkeypatch.setenv("TOY_RANK", "1")
    monkeypatch.setenv("TOY_SIGNAL", "an error")
    status, out, error = cli("run", toy, "--no-baseline", *TWO, "--traceback")
    assert status == 2
    assert error.splitlines()[-1] == "error: The toy cannot go on."
    assert "in process 1:\nTraceback" in error
    assert "Traceback" not in out


REFUSED = [
    ([*TWO, "--trainer.strategy", "ddp_spawn"], "--trainer.strategy ddp"),
    ([*TWO, "--trainer.num_nodes", "2"], "on one machine"),
    ([*SHARDS, "--trainer.strategy.save_distributed_checkpoint", "true"], "save_distributed_checkpoint false"),
    ([*SHARDS, "--trainer.strategy.tensor_parallel_size", "auto"], "tensor_parallel_size=1"),
    (
        [*SHARDS, "--trainer.callbacks+", "lightning_peft.LayerGrowth", "--LayerGrowth.start", "2"],
        "does not work under the fsdp2 strategy",
    ),
    ([*SHARDS, "--NMSparsity.targets", "[model.9]"], "model.9"),
    (["--NMSparsity.targets", "[model.8]"], "model.8"),
    ([*TWO, "--trainer.fast_dev_run", "true"], "--check"),
]


@pytest.mark.parametrize(("given", "answer"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_done_is_answered_before_any_process_starts(cli, sharded, monkeypatch, given, answer) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    status, out, error = cli("run", sharded, *given)
    assert status == 2
    assert answer in error
    assert "epoch" not in out
    assert len(error.splitlines()) == 1


def test_processes_that_others_started_are_not_started_again(cli, toy, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    status, _, error = cli("run", toy, *TWO)
    assert status == 2
    assert "without torchrun" in error


def test_adapt_works_in_one_process(cli, toy) -> None:
    status, _, error = cli("adapt", toy, "--trainer.callbacks", "lightning_peft.Tent", *TWO)
    assert status == 2
    assert "add --trainer.devices 1" in error

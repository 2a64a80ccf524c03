"""Commands that are stopped: by Ctrl-C, by SIGTERM, in the middle of a write."""

from __future__ import annotations

import json
import os
import shlex
import signal
from types import SimpleNamespace

import pytest
import torch

from lightning_peft.cli import compare, run
from lightning_peft.cli.beside import LastEpoch

SIGNALS = ["SIGINT", "SIGTERM"]


@pytest.fixture(autouse=True)
def _heard():
    """A shell starts what it puts into the background deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_that_is_stopped_says_how_to_go_on_and_ends_as_one_that_was_not(cli, toy, tmp_path, monkeypatch) -> None:
    start = ["run", toy, "--no-baseline"]
    assert cli(*start, "--out", "whole")[0] == 0
    handlers = [signal.getsignal(signal.Signals[name]) for name in SIGNALS]
    for name in SIGNALS:
        monkeypatch.setenv("TOY_SIGNAL", name)
        monkeypatch.setenv("TOY_KILL_AT", "7")  # in the middle of the second of three epochs
        status, _, error = cli(*start, "--out", f"stopped by {name}")
        assert status == 130
        (line,) = error.splitlines()
        assert line.startswith("interrupted. Continue with: lightning-peft run ")
        monkeypatch.delenv("TOY_KILL_AT")
        words = shlex.split(line.partition("lightning-peft ")[2])
        status, data, error = cli(*words, "--json")
        assert status == 0, error
        assert data["composed"]["metrics"] == json.loads((tmp_path / "whole/report.json").read_text())["composed"]["metrics"]
        for file in ("model.ckpt", "baked.ckpt"):
            whole, stopped = (
                torch.load(tmp_path / folder / file, weights_only=True)["state_dict"] for folder in ("whole", data["out"])
            )
            assert all(torch.equal(whole[key], stopped[key]) for key in whole | stopped)
    assert [signal.getsignal(signal.Signals[name]) for name in SIGNALS] == handlers


@pytest.mark.parametrize("name", SIGNALS)
def test_a_command_is_stopped_outside_of_a_training_too(cli, toy, monkeypatch, name) -> None:
    def stop(*_, **__) -> None:
        os.kill(os.getpid(), signal.Signals[name])

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "train", stop)
    status, _, error = cli("run", toy)
    assert (status, error.strip()) == (130, "interrupted. Nothing was trained yet.")
    assert cli("run", toy, "--check")[2].strip() == "interrupted."
    monkeypatch.setattr(compare, "train", stop)
    assert cli("compare", toy, "--dense")[2].strip() == "interrupted. The same command goes on from there."
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_that_was_forked_off_ends_by_sigterm_as_it_would_without_us() -> None:
    from lightning_peft.cli.interrupts import sigterm_interrupts

    with sigterm_interrupts():
        child = os.fork()
        if not child:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:  # this process is a copy of the tests
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_write_that_is_cut_short_leaves_the_epoch_before(tmp_path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_text("the first epoch")

    def save(place) -> None:
        place.write_text("the sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LastEpoch(path).on_train_epoch_end(SimpleNamespace(save_checkpoint=save, is_global_zero=True), None)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.ckpt", "the first epoch")]

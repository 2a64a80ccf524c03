from __future__ import annotations

import json
import logging

import pytest
import torch
from quick_plots import draw_quickly

TOY = """\
# recipe: {summary: "A toy, for tests",
#   minutes: 0.1}
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 3
  log_every_n_steps: 1
  callbacks:
    - class_path: cli_toys.Killer
    - class_path: cli_toys.ToyMask
    - class_path: cli_toys.ToyTerm
      init_args: {weight: 0.2}
model:
  class_path: cli_toys.ToyModule
data:
  class_path: cli_toys.ToyData
"""


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    """Run in an empty folder, with one thread, and leave Lightning's log level and seeds in the environment alone."""
    monkeypatch.chdir(tmp_path)
    draw_quickly(monkeypatch)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # whatever a command sets is taken back
        monkeypatch.setenv(name, "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def toy(tmp_path):
    """Path of a recipe file."""
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


@pytest.fixture
def cli(capsys):
    """Run the command line in this process; return exit code, standard output (parsed with --json) and standard error."""
    from lightning_peft.cli.main import main

    def call(*arguments: object):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if "--json" in arguments and status == 0 else captured.out, captured.err

    return call

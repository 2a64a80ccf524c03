from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from lightning.pytorch.trainer.connectors import callback_connector
from lightning.pytorch.utilities import model_helpers

from lightning_peft.testing.ddp import run_ddp

# Doctests are collected from every module; two conftest.py would meet as modules of one name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]

# A machine that does something else beside must not make a property look false.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

gc.disable()  # until the first test: collecting tests imports much that stays

# Every Trainer asks all installed packages for callbacks of theirs, which takes a tenth of a tiny training; the answer does not
# change while tests run.
callback_connector._load_external_callbacks = functools.cache(callback_connector._load_external_callbacks)

# Loading looks for a scripting compiler among its callers; with the source around each line of pytest's deep stack that takes
# 40 ms, and only the names of files are asked for.
model_helpers.inspect = SimpleNamespace(stack=functools.partial(inspect.stack, context=0))

# Seeding a device that is not there keeps the caller's stack, in words, for the day when it comes: 2 ms below pytest.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a test module, for what its ranks leave."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(request, folder):
    """What ``on_rank(folder)`` of a test module returns in each of two processes."""
    return run_ddp(f"{request.module.__file__}:on_rank", {"folder": str(folder)})


@pytest.fixture(autouse=True, scope="session")
def _quiet_single_thread():
    torch.set_num_threads(1)
    gc.enable()
    gc.set_threshold(20_000, 20, 20)  # tiny trainings make many small objects, few of them in cycles
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """Take what is alive as there to stay, packages above all, so that collections do not walk over it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # what a recipe that seeds everything leaves to later tests
        os.environ.pop(name, None)
    torch.manual_seed(0)

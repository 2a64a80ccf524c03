"""Places that cannot be written: one message, exit code 2, and nothing left behind."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch

from lightning_peft.cli.main import main

WRITERS = [
    ("bake", "model.ckpt", "-o", "{place}/plain.ckpt"),
    ("report", "model.ckpt", "-o", "{place}"),
    ("export", "model.ckpt", "--to", "safetensors", "-o", "{place}/net"),
    ("report", "model.ckpt", "--before", "model.ckpt", "--recipe", "toy.yaml", "-o", "{place}/about"),
    ("run", "toy.yaml", "--out", "{place}/deep/er"),
    ("compare", "toy.yaml", "--dense", "--out", "{place}"),
    ("adapt", "toy.yaml", "--out", "{place}"),
]


@pytest.fixture
def model(toy):
    """A checkpoint beside the toy recipe."""
    torch.save({"state_dict": {"weight": torch.ones(64, 64)}}, "model.ckpt")
    return Path("model.ckpt")


def seen() -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*") if path.suffix != ".pyc"}


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: words[0])
def test_a_file_in_the_way_is_found_before_any_work(cli, model, words) -> None:
    before = seen()
    status, _, error = cli(*(word.format(place="toy.yaml/inside") for word in words))
    assert status == 2
    (line,) = error.splitlines()
    assert line.startswith("error: The folder toy.yaml/inside")
    assert f"Choose another with {'-o' if '-o' in words else '--out'}." in line
    assert seen() == before


@pytest.mark.skipif(sys.platform != "linux", reason="drops rights as Linux does")
@pytest.mark.parametrize("words", WRITERS, ids=lambda words: words[0])
def test_a_read_only_folder_is_named(model, capsys, words) -> None:
    Path("locked").mkdir(mode=0o555)
    before, found = seen(), []

    def call() -> None:
        # Rights are those of a thread; root's would write anywhere.
        none = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), none) == 0
        found.append(main([word.format(place="locked") for word in words]))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    error = capsys.readouterr().err
    assert found == [2]
    (line,) = error.splitlines()
    assert line.startswith("error: The folder locked")
    assert "cannot be written" in line
    assert seen() == before


@pytest.fixture
def full_disk():
    """No file may get longer than this, which ends a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_said_and_no_half_file_stays(cli, model, full_disk) -> None:
    before = seen()
    full_disk(4096)
    for words in (("bake", model, "-o", "plain.ckpt"), ("report", model), ("export", model, "--to", "safetensors")):
        status, _, error = cli(*words)
        assert status == 2
        (line,) = error.splitlines()
        assert "File too large" in line
        assert "(--traceback" not in line
    full_disk(1 << 30)
    assert {path for path in seen() if path.is_file()} == set(before)

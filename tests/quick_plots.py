"""Plots as quick as matplotlib draws them: `tests/report` looks at real ones, and elsewhere they would be most of the time."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.report import plots

USUAL = plots.style


def coarse(theme: str) -> dict[str, Any]:
    """The settings of a theme without its layout, and few pixels."""
    return USUAL(theme) | {"figure.constrained_layout.use": False, "savefig.dpi": 40}


def draw_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw coarsely for the length of a test."""
    monkeypatch.setattr(plots, "style", coarse)

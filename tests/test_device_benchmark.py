"""The script for a machine with a GPU: what it says without one, and what a section leaves that fails or takes too long."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for needed in ("timm", "transformers", "peft"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import device

    return device


def test_without_a_card_nothing_is_measured(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["device.py"])
    with pytest.raises(SystemExit, match=r"no CUDA device here.*--cpu"):
        script.main()


def test_what_was_found_before_a_failure_is_kept(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Pipe:
        send = staticmethod(sent.append)

    def section(tiny: bool) -> Iterator[dict[str, Any]]:
        """Finds one number."""
        yield {"number": 1 / 3}
        raise ValueError("no more")

    monkeypatch.setitem(script.SECTIONS, "masks", (section, 1))
    monkeypatch.setattr(script.os, "setsid", lambda: None)
    script.work("masks", True, Pipe())
    assert sent == [{"number": 1 / 3}, "ValueError: no more"]
    page = script.markdown({"card": "X"}, {"masks": script.Outcome(sent[:1], 1.0, sent[1])})
    assert all(
        part in page for part in ("card X", "## Masks", "| number |", "| 0.333 |", "**Not finished: ValueError: no more**")
    )


def test_a_section_ends_when_its_time_is_over(script: ModuleType) -> None:
    outcome = script.section("masks", True, 0.0)
    assert outcome.failed == "its 0 seconds were over"
    assert not outcome.rows


@pytest.mark.slow
def test_a_rehearsal_writes_the_page(script: ModuleType, tmp_path: Path) -> None:
    sections = ["masks", "sparse_layers"]
    command = [sys.executable, BENCHMARKS / "device.py", "--cpu", "--output", tmp_path / "gpu", "--sections", *sections]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: bool(section["rows"]) for name, section in found["sections"].items()} == dict.fromkeys(sections, True)
    assert "figures mean nothing" in (tmp_path / "gpu.md").read_text()

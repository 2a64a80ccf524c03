"""Running the lines that commands print."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CODE = """
import json, sys, torch
for number, lines in enumerate(json.loads(sys.argv[1])):
    scope = {}
    exec("\\n".join(lines), scope)
    torch.save(scope["net"].state_dict(), f"{number}.pt")
"""


def loaded(tmp_path: Path, *made: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Run the lines each command printed in a new process, in another folder, and return the tensors they give."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lines = json.dumps([data["loading"] for data in made])
    subprocess.run([sys.executable, "-W", "ignore", "-c", CODE, lines], check=True, cwd=elsewhere)
    return [torch.load(elsewhere / f"{number}.pt", weights_only=True) for number in range(len(made))]

"""Running the lines that commands print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from warm_python import python

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
    done = python("-W", "ignore", "-c", CODE, lines, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    return [torch.load(elsewhere / f"{number}.pt", weights_only=True) for number in range(len(made))]

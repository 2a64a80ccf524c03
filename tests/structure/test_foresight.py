from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.foresight import check_sizes

LAYER, NOTHING = ["Linear:12345678"], ["ReLU:00000000"]


def blocks(count: int, path: str = "h", before: Any = 1, kinds: Any = LAYER) -> dict[str, Any]:
    return {"op": "blocks", "path": path, "from": before, "sources": [0] * count, "block": kinds}


def width(**shapes: list[int]) -> dict[str, Any]:
    return {"op": "width", "tensors": {name.replace("__", "."): {"to": shape} for name, shape in shapes.items()}}


def state(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2) for name in names}


TWO = state("h.0.w", "h.1.w")


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ([blocks(2)], TWO),
        ([blocks(3, kinds=NOTHING)], TWO),  # the last one has no tensors
        ([blocks(64, before=0, kinds=NOTHING)], state("h.0.w")),
        ([blocks(64_000, before=10**9, kinds=NOTHING)], state("h.0.w")),
        ([blocks(20), blocks(2)], TWO),  # grown, and cut later
        ([blocks(3, path="h.0.sub", before=2), blocks(2)], TWO),
        ([blocks(2), width(h__0__w=[2])], TWO),
        ([width(h__0__w=[5]), width(h__0__w=[2])], TWO),
        ([width(h__0__w=[5]), blocks(2)], TWO),  # what was block 0 may be another now
        ([width(gone=[100])], TWO),
        ([width(h__0__w=["x"])], TWO),  # left to who applies it
    ],
)
def test_what_the_file_can_hold_is_let_through(edits: list[dict[str, Any]], found: dict[str, torch.Tensor]) -> None:
    check_sizes(edits, found)


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ([blocks(3)], TWO),
        ([blocks(1)], TWO),
        ([blocks(1, kinds=NOTHING)], TWO),
        ([blocks(65, before=0, kinds=NOTHING)], state("h.0.w")),
        ([blocks(64_001, before=10**9, kinds=NOTHING)], state("h.0.w")),
        ([blocks(64_001, before=10**9), blocks(2)], TWO),
        ([blocks(2), blocks(3)], TWO),
        ([width(h__0__w=[3])], TWO),
        ([width(gone=[10**9])], TWO),
        ([width(h__0__w=[10**9]), width(h__0__w=[2])], TWO),
    ],
)
def test_what_it_cannot_hold_is_refused(edits: list[dict[str, Any]], found: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="journal leads to"):
        check_sizes(edits, found)

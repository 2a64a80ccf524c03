"""What parts of one kind learned: on a module in training, kept beside one after a fit, or in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import part_states
from lightning_peft.structure.earlier_parts import upgraded
from lightning_peft.weights import stash
from lightning_peft.weights.parts import placed_parts

FoundParts = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
"""Configuration and state of one kind of part, by the name of the layer it stands beside."""


def parts_of_module(module: nn.Module, kind: str) -> FoundParts:
    """Find the parts of one kind on a module in training, or those its last fit left beside it.

    They are gone when the module's weights were changed since.
    """
    found: FoundParts = {}
    for placed in placed_parts(module):
        if placed.part.kind == kind:
            state = {key: value.detach() for key, value in placed.part.state_dict().items()}
            found[placed.path] = (placed.part.config(), state)
    for path, kept in stash.peek_parts(module).items():
        for record, state in zip(kept.records, kept.states, strict=True):
            if record["part"] == kind:
                found.setdefault(path, (record["config"], state))
    return found


def parts_of_checkpoint(checkpoint: Mapping[str, Any], kind: str) -> FoundParts:
    """Find the parts of one kind in a checkpoint.

    Raises:
        CheckpointError: The library's part of the checkpoint is malformed.
    """
    records = part_states.read(files.read(upgraded(checkpoint)))
    return {
        path: (record["config"], record["state"])
        for path, entries in records.items()
        for record in entries
        if record["part"] == kind
    }

"""The states of weight maps, wherever they are: on a module in training, kept beside one after a fit, or in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.structure import checkpoint as files
from lightning_peft.structure.plain_state import joined
from lightning_peft.weights import stash
from lightning_peft.weights.mapped_layer import map_prefix
from lightning_peft.weights.maps import mapped_tensors

MapStates = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
"""Configuration and state of one kind of map, by the name of the tensor it stands on."""


def states_of_module(module: nn.Module, kind: str) -> MapStates:
    """Find the states of one kind of weight map on a module in training, or those its last fit left beside it.

    They are gone when the module's weights were changed since.
    """
    found: MapStates = {}
    for mapped in mapped_tensors(module):
        for entry in mapped.maps:
            if entry.kind == kind:
                found[mapped.name] = (entry.config(), {key: value.detach() for key, value in entry.state_dict().items()})
    for name, kept in stash.peek(module).items():
        for record, state in zip(kept.records, kept.states, strict=True):
            if record["map"] == kind:
                found.setdefault(name, (record["config"], state))
    return found


def states_of_checkpoint(checkpoint: Mapping[str, Any], kind: str) -> MapStates:
    """Find the states of one kind of weight map in a checkpoint.

    Raises:
        CheckpointError: The library's part of the checkpoint is malformed.
    """
    section = files.read(checkpoint)
    found: MapStates = {}
    tensors = joined(checkpoint["state_dict"], section).items()
    for name, records in ({} if section is None else section["weights"]).items():
        for position, record in enumerate(records):
            if record["map"] == kind:
                prefix = map_prefix(name, position)
                state = {key.removeprefix(prefix): value for key, value in tensors if key.startswith(prefix)}
                found[name] = (record["config"], state)
    return found

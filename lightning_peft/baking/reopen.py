"""Putting back on an ordinary module the weight maps and layer parts that a checkpoint was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import part_states, plain_state
from lightning_peft.weights.detach import attachments, settle
from lightning_peft.weights.mapped_layer import map_prefix, maps_prefix
from lightning_peft.weights.maps import attach_map, attached_map
from lightning_peft.weights.parts import put_part


def reopen(module: LightningModule, state: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    """Attach what a section records, with the values it had; all of it stays on the module.

    Args:
        module: An ordinary module with the weights of the same checkpoint.
        state: Tensors of the checkpoint by the names of its format; those under maps or beside parts are read.
        section: The library's part of the checkpoint.

    Raises:
        CheckpointError: A map or part is of no installed method, or does not fit.
    """
    joined = part_states.beside(plain_state.joined(state, section), section)
    for name, records in section["weights"].items():
        for place, record in enumerate(records):
            weight_map = files.rebuild_map(record)
            weight_map.take_precision(plain_state.below(joined, map_prefix(name, place)))
            if attached_map(module, name, weight_map) is None:  # a layer that stands in two places is recorded twice
                attach_map(module, name, weight_map)
    records = part_states.read(section)
    for path, entries in records.items():
        for entry in entries:
            put_part(module, path, part_states.rebuild_part(entry))
    module.load_state_dict(_of_weights(joined, section), strict=False)
    part_states.restore({path: [entry["state"] for entry in entries] for path, entries in records.items()}, module)
    settle(module)
    for attachment in attachments(module):
        attachment.stays = True


def _of_weights(joined: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Tensor]:
    names = {*section["weights"], *section.get(part_states.WEIGHTS, {})}
    prefixes = tuple(map(maps_prefix, section["weights"]))
    return {key: value for key, value in joined.items() if key in names or (prefixes and key.startswith(prefixes))}

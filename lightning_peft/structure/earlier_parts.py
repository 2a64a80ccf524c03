"""Files from before there were layer parts: what is a part today was a weight map that left its weight as it is."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import registry
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import part_states
from lightning_peft.weights.mapped_layer import map_prefix, stored_key


def upgraded(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint with the records and tensors of such maps where those of parts are; itself when there are none.

    Optimizer state stays as it is: the order of parameters is the same.

    Raises:
        CheckpointError: The library's part of the checkpoint is malformed.
    """
    section = files.read(checkpoint)
    if section is None or not any(_is_part(record) for records in section["weights"].values() for record in records):
        return checkpoint
    names = {record["method"]: record["name"] for record in section["methods"]}
    moved = {key: dict(checkpoint[key]) for key in ("state_dict", "current_model_state") if key in checkpoint}
    found = {key: _move(state, section["weights"], names) for key, state in moved.items()}
    weights = {name: [record for record in records if not _is_part(record)] for name, records in section["weights"].items()}
    owners = [record["method"] for records in weights.values() for record in records]
    methods = [{**record, "maps": owners.count(record["method"])} for record in section["methods"]]
    weights = {name: records for name, records in weights.items() if records}
    section = {**section, "weights": weights, "methods": methods} | part_states.section_of(found["state_dict"], {})
    if len(found) > 1:
        copies = (found["current_model_state"], found["state_dict"])
        section[part_states.COPIES] = [
            {path: [record["state"] for record in records] for path, records in states.items()} for states in copies
        ]
    return {**checkpoint, **moved, files.KEY: section}


def _is_part(record: Mapping[str, Any]) -> bool:
    try:
        method = registry.find(record["method"])
    except MisconfigurationException:
        return False
    return any(part.kind == record["map"] for part in method.parts)


def _move(
    state: MutableMapping[str, Any], weights: Mapping[str, list[dict[str, Any]]], names: Mapping[str, str]
) -> part_states.PartRecords:
    """Take the tensors of such maps out of a state dict, in place, and give what is left the names it has without them."""
    found: part_states.PartRecords = {}
    for name, records in weights.items():
        if not any(map(_is_part, records)):
            continue
        stay = 0
        for position, record in enumerate(records):
            prefix = map_prefix(name, position)
            own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
            if _is_part(record):
                part = {"part": record["map"], "method": record["method"], "name": names.get(record["method"], "")}
                path = name.rpartition(".")[0]
                found.setdefault(path, []).append({**part, "enabled": True, "config": record["config"], "state": own})
            else:
                state.update({map_prefix(name, stay) + key: value for key, value in own.items()})
                stay += 1
        if not stay and stored_key(name) in state:
            state[name] = state.pop(stored_key(name))
    return found

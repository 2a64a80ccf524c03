"""Checkpoints of runs with methods, baked one weight at a time, when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_peft.baking.bake import kept, record_of
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import part_states, plain_state
from lightning_peft.structure import partial as partials
from lightning_peft.structure.earlier_parts import upgraded
from lightning_peft.weights.mapped_layer import maps_prefix


@dataclass(frozen=True)
class Baked:
    """An ordinary checkpoint.

    Attributes:
        state: Tensors by plain name, as large and of the same kind as the baked ones.
        computed: By name, what bakes those that methods had a say in.
        rest: What else it holds.
    """

    state: Mapping[str, Any]
    computed: Mapping[str, Callable[[], Tensor]]
    rest: Mapping[str, Any]


def lazily_baked(checkpoint: Mapping[str, Any], label: str, base: Model | None) -> Baked | None:
    """Do what :func:`lightning_peft.baking.bake.baked` does, in the memory of one layer.

    Args:
        checkpoint: What stands in the file.
        label: What messages call it.
        base: The model that it was trained from, for one that holds only what was trained.

    Returns:
        ``None`` for a checkpoint that no method had a say in, or of a format that cannot be read in parts.

    Raises:
        CheckpointError: The checkpoint is damaged, or was trained on another base.
        MergeError: The base is missing.
    """
    found = upgraded(checkpoint)
    section = files.read(found)
    if section is None or section["version"] < plain_state.PLAIN:
        return None
    left_out = section.get("base") or {}
    if left_out and base is None:
        raise MergeError(
            f"{label} holds only what was trained, not {next(iter(left_out))} and {len(left_out) - 1} more tensors of its "
            "base. Give that with base= (on the command line: --base)."
        )
    state = dict(found["state_dict"])
    if left_out:
        assert base is not None
        partials.check_base(left_out, base.tensors, base.value)
        everything = state | {name: base.tensors[name] for name in left_out if name not in state}
        state = {name: everything[name] for name in dict.fromkeys([*base.tensors, *everything]) if name in everything}
    plain_state.refuse_edited(plain_state.edited(state, section))
    plain_state.joined(state, section, section["weights"])  # for its complaints
    files.check_counts(section)
    changed = {*section["weights"], *_of_parts(section, state)}
    if missing := [name for name in changed if name not in state]:
        raise files.CheckpointError(f"{label} records a method's work on {missing[0]}, which is not in its state.")
    from_base = {name: base for name in left_out if base is not None and name not in found["state_dict"]}
    computed = {name: partial(_bake, name, state, section, from_base) for name in changed}
    return Baked(state, computed, kept(found) | {files.KEY: record_of(section)})


def _of_parts(section: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Names of tensors in layers with parts."""
    return [name for path in part_states.read(section) for name in _in_layer(path, state)]


def _in_layer(path: str, state: Mapping[str, Any]) -> list[str]:
    names = (part_states.tensor_name(path, key) for key in ("weight", "bias"))
    return [name for name in names if isinstance(state.get(name), Tensor)]


def _bake(name: str, state: Mapping[str, Any], section: Mapping[str, Any], from_base: Mapping[str, Model]) -> Tensor:
    """Bake the layer of a tensor alone."""
    path = name.rpartition(".")[0]
    names = {name, *(_in_layer(path, state) if path in part_states.read(section) else ())}
    own = {each: from_base[each].value(each).clone() if each in from_base else state[each] for each in names}
    weights = {each: records for each, records in section["weights"].items() if each in names}
    begin = tuple(map(maps_prefix, names))
    alone = {
        **section,
        "weights": weights,
        "tensors": {key: value for key, value in (section.get("tensors") or {}).items() if key.startswith(begin)},
        "methods": [],
        part_states.PARTS: {each: records for each, records in part_states.read(section).items() if each == path},
    }
    return files.bake_state_dict(plain_state.joined(own, alone), alone)[name]

"""Layer parts in a checkpoint.

The names of the module's state dict stay as they are: the tensors of parts stand in the library's section. A weight that parts
go into stands in the state dict as an ordinary layer would have it, so that the file loads without this library; the weight
beside the parts, from which training goes on, stands in the section too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import registry
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.forms import anything, dict_of, fields, flag, list_of, tensor, text
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.layer_part import LayerPart
from lightning_peft.weights.mapped_layer import stored_key
from lightning_peft.weights.parts import part_stacks, placed_parts, recorded_parts
from lightning_peft.weights.shards import read_whole, spread_as, whole

PARTS, WEIGHTS, MERGED, COPIES = "parts", "part_weights", "part_merged", "part_copies"

PartRecords = dict[str, list[dict[str, Any]]]
"""What :meth:`LayerPart.record` gives with the part's tensors under ``"state"``, innermost first, by name of the layer."""

PartStates = dict[str, list[dict[str, Any]]]
"""Tensors of the parts alone, by name of the layer."""


def write(
    state: MutableMapping[str, Any], beside: MutableMapping[str, Any], module: nn.Module, mapped: Collection[str]
) -> dict[str, Any]:
    """Return what the section says of the parts on a module, and let them into the weights of its state dict, in place.

    Args:
        state: Tensors by plain name.
        beside: What training needs beside them, by training-time name; gets the stored values of weights under maps.
        module: The module.
        mapped: Names of weights under maps.
    """
    states = states_of(module)
    records: PartRecords = {}
    weights: dict[str, Tensor] = {}
    merged: list[str] = []
    for path, layer, stack in part_stacks(module, every_name=True):
        if stack.recorded:
            records[path] = [{**part.record(), "state": own} for part, own in zip(stack.recorded, states[path], strict=True)]
        for name, key in ((tensor_name(path, key), key) for key in stack.into(layer)):
            if name not in state:
                continue
            if name in mapped:  # the stored value is at hand, and is not what the file's weight is any more
                beside.setdefault(stored_key(name), state[name])
                merged.append(name)
            else:
                weights[name] = state[name]
            with read_whole(*stack.parts):
                state[name] = spread_as(state[name], stack.merged(key, whole(state[name])))
    return section_of(records, weights, merged)


def beside(state: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a file with the weights that stand beside parts, not those that parts went into."""
    weights = section.get(WEIGHTS, {})
    return {**state, **{name: value for name, value in weights.items() if name in state}}


def section_of(records: PartRecords, weights: Mapping[str, Tensor], merged: Sequence[str] = ()) -> dict[str, Any]:
    """Return the entries of the section; none for a module without parts.

    Args:
        records: The parts.
        weights: Weights that parts went into, without them, by name.
        merged: Names of weights under maps that parts went into.
    """
    return {PARTS: records, WEIGHTS: dict(weights), MERGED: list(merged)} if records else {}


def together(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of :func:`section_of` for the parts of two sections."""
    records, weights = ({**one.get(key, {}), **other.get(key, {})} for key in (PARTS, WEIGHTS))
    return section_of(records, weights, [*one.get(MERGED, ()), *other.get(MERGED, ())])


def tensor_name(path: str, key: str) -> str:
    """Return the name of a tensor that a layer holds."""
    return f"{path}.{key}" if path else key


def states_of(module: nn.Module) -> PartStates:
    """Return the tensors of the parts on a module."""
    return {path: [dict(part.state_dict()) for part in parts] for path, parts in recorded_parts(module, every_name=True)}


def read(section: Mapping[str, Any] | None) -> PartRecords:
    """Return the records in the library's part of a checkpoint, after checking their shape; empty when there are none.

    Raises:
        CheckpointError: They are malformed.
    """
    section = {} if section is None else section
    for key, form in _FORMS.items():
        found = form(section[key], f'checkpoint["lightning_peft"]["{key}"]') if key in section else None
        if found is not None:
            raise CheckpointError(f"The record of layer parts is malformed: {found}.")
    return section.get(PARTS, {})  # type: ignore[no-any-return]


_RECORD = {"part": text, "method": text, "name": text, "enabled": flag, "config": dict_of(anything), "state": dict_of(anything)}
_FORMS = {
    PARTS: dict_of(list_of(fields(_RECORD))),
    WEIGHTS: dict_of(tensor(finite=False)),
    MERGED: list_of(text),
    COPIES: list_of(dict_of(anything)),
}


def difference(records: PartRecords, module: nn.Module) -> str | None:
    """Say how the recorded parts differ from those on a module; ``None`` when they agree."""
    now = {path: [(part.method, part.kind) for part in parts] for path, parts in recorded_parts(module, every_name=True)}
    then = {path: [(record["name"], record["part"]) for record in entries] for path, entries in records.items()}
    for path in dict.fromkeys([*then, *now]):
        if then.get(path) != now.get(path):
            return f"{path} had {_list(then.get(path))} beside it when it was saved and has {_list(now.get(path))} now"
    return None


def _list(names: Sequence[tuple[str, str]] | None) -> str:
    return " and ".join(f"the part {kind!r} of {method}" for method, kind in names) if names else "no part"


def check_states(states: PartStates, module: nn.Module) -> None:
    """Refuse tensors that are not those of a module's parts, before anything of them is copied.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    for path, parts in recorded_parts(module, every_name=True):
        for part, state in zip(parts, states.get(path, ()), strict=True):
            own = part.state_dict()
            for key in dict.fromkeys([*own, *state]):
                a, b = own.get(key), state.get(key)
                both = isinstance(a, Tensor) and isinstance(b, Tensor)
                if not (a.shape == b.shape if both and not key.endswith("_extra_state") else key in own and key in state):  # type: ignore[union-attr]
                    raise CheckpointError(
                        f"The checkpoint's tensor {key} of the part {part.kind!r} of {part.owner} on {path} does not fit: "
                        f"{_shape(b)} in the file, {_shape(a)} here. Give the method the arguments it was saved with."
                    )


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "none"


@torch.no_grad()
def restore(states: PartStates, module: nn.Module) -> None:
    """Give the parts on a module the tensors of a file, bit for bit."""
    for path, parts in recorded_parts(module):
        for part, state in zip(parts, states[path], strict=True):
            own = part.state_dict()
            part.load_state_dict({key: spread_as(own.get(key), value) for key, value in state.items()})


def restore_switches(records: PartRecords, module: nn.Module) -> None:
    """Switch the parts on a module on and off as they were."""
    for path, parts in recorded_parts(module):
        for part, record in zip(parts, records[path], strict=True):
            part.enabled = record["enabled"]


def merge(state: MutableMapping[str, Tensor], section: Mapping[str, Any], done: Collection[str]) -> None:
    """Let recorded parts into the weights of a plain state dict that does not have them yet, in place.

    Args:
        state: Tensors by plain name.
        section: The library's part of their checkpoint.
        done: Names of weights that have them.

    Raises:
        CheckpointError: A part cannot go into the weight, or does not fit it.
    """
    for path, entries in read(section).items():
        weight, bias = (tensor_name(path, key) for key in ("weight", "bias"))
        if weight in done and bias not in (section.get("base") or {}):  # a bias that is left out is the base's, without them
            continue
        for record in entries:
            part = rebuild_part(record)
            if part.training_only or not record["enabled"]:
                continue
            if not part.merges and weight not in done:
                raise CheckpointError(
                    f"The part {part.kind!r} of {record['method']} on {path} computes something that no weight can, so it "
                    f"cannot be baked. Evaluate the file with Trainer(callbacks=[{record['method']}(...)]).test(module, "
                    "ckpt_path=...), or train with exclude= for that layer."
                )
            try:
                part.load_state_dict(record["state"])
                with torch.no_grad():
                    for key in part.into:
                        name = tensor_name(path, key)
                        if name not in done and (key == "weight" or name in state):
                            state[name] = part.merged_into(key, state[name]).detach()
            except Exception as error:  # what stands in a damaged file nobody can foresee
                raise CheckpointError(f"The state of the part {part.kind!r} on {path} does not fit: {error!r}") from error


def in_file(section: Mapping[str, Any] | None) -> set[str]:
    """Return the names of the weights that parts went into in the file."""
    return set() if section is None else {*section.get(WEIGHTS, ()), *section.get(MERGED, ())}


def rebuild_part(record: Mapping[str, Any]) -> LayerPart:
    """Build the part a record describes, from an installed method only.

    Raises:
        CheckpointError: The method has no such part, or its arguments do not fit.
    """
    for candidate in registry.find(record["method"]).parts:
        if candidate.kind == record["part"]:
            try:
                part: LayerPart = candidate(**record["config"])
            except Exception as error:  # a part's author cannot foresee what stands in a damaged file
                raise CheckpointError(f"The recorded arguments of the part {record['part']!r} do not fit: {error}") from error
            part.owner, part.method, part.enabled = record["method"], record["name"], record["enabled"]
            _resize(part, record["state"])
            part.take_precision(record["state"])
            return part
    raise CheckpointError(
        f"The method {record['method']} has no layer part {record['part']!r}; upgrade the package that ships it."
    )


def _resize(part: LayerPart, state: Mapping[str, Any]) -> None:
    """Give a part the sizes of recorded tensors: it may have been cut or widened with its layer since it was made."""
    for name, own in (*part.named_parameters(), *part.named_buffers()):
        recorded = state.get(name)
        if isinstance(recorded, Tensor) and recorded.ndim == own.ndim and recorded.shape != own.shape:
            own.data = own.new_empty(recorded.shape)


def unmergeable(module: nn.Module, stay: Collection[Attachment] = frozenset()) -> list[str]:
    """Name the parts that would be lost if a module became an ordinary one now, as ``"<kind> of <method> on <layer>"``.

    Args:
        module: The module.
        stay: What stays on it.
    """
    return [
        f"{placed.part.kind!r} of {placed.part.owner} on {placed.path}"
        for placed in placed_parts(module)
        if placed.part.enabled and not placed.part.merges and not placed.part.training_only and placed.part not in stay
    ]

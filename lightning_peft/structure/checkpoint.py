"""The library's part of a checkpoint: which methods ran, and which weight maps stand on which tensor.

It is written through the LightningModule's own hook, so weights-only files carry it too, and it is plain data: nothing in it is
imported or evaluated. The tensors of the checkpoint are those of an ordinary module; what training needs beside them is here
too (:mod:`lightning_peft.structure.plain_state`), unless the file was written before format 3.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import registry
from lightning_peft.structure import part_states
from lightning_peft.structure.errors import CheckpointError as CheckpointError
from lightning_peft.structure.forms import anything, dict_of, fields, maybe, text, whole
from lightning_peft.structure.plain_state import PLAIN
from lightning_peft.weights import shards
from lightning_peft.weights.mapped_layer import map_prefix, maps_prefix, stored_key
from lightning_peft.weights.maps import MappedTensor, WeightMap, mapped_tensors
from lightning_peft.weights.stash import StashedTensor

KEY = "lightning_peft"
FORMAT = 3
ORDERED = 2
"""Since this format optimizers hold a module's parameters in the module's own order, whether weight maps are on them or not."""

MapRecord = dict[str, Any]


def section_of(module: nn.Module, methods: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe a module under weight maps as plain data for ``checkpoint["lightning_peft"]``."""
    tensors = mapped_tensors(module, every_name=True)
    return section({mapped.name: [weight_map.record() for weight_map in mapped.maps] for mapped in tensors}, methods)


def section(weights: Mapping[str, list[MapRecord]], methods: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the library's part of a checkpoint from the records of weight maps by tensor name, and of methods."""
    owners = [item["method"] for records in weights.values() for item in records]
    # How many maps a method put on tensors is said twice, so that a list that lost one does not bake into a dense weight.
    counted = [{**method, "maps": owners.count(method["method"])} for method in methods]
    return {"version": FORMAT, "methods": counted, "weights": dict(weights)}


def read(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the library's part of a checkpoint after checking its shape, or ``None`` when there is none.

    Raises:
        CheckpointError: Unknown version or malformed content.
    """
    section = checkpoint.get(KEY)
    if section is None:
        return None
    if not isinstance(section, dict) or not isinstance(section.get("version"), int):
        raise CheckpointError(f'checkpoint["{KEY}"] is malformed: it must be a dict with an integer "version".')
    if not 1 <= section["version"] <= FORMAT:
        raise CheckpointError(
            f"This checkpoint has lightning_peft format {section['version']}; this version of the library reads formats 1 to "
            f"{FORMAT}. Upgrade lightning-peft, or bake the checkpoint with the version that wrote it."
        )
    weights = section.get("weights")
    _check_beside(section)
    if not isinstance(weights, dict) or not isinstance(section.get("methods"), list):
        raise CheckpointError(f'checkpoint["{KEY}"] is malformed: "weights" must be a dict and "methods" a list.')
    for place, record in enumerate(section["methods"]):
        _check_method(record, f'checkpoint["{KEY}"]["methods"][{place}]')
    for name, records in weights.items():
        well_formed = isinstance(name, str) and isinstance(records, list) and records and all(map(_is_record, records))
        if not well_formed:
            raise CheckpointError(f'checkpoint["{KEY}"]["weights"][{name!r}] is malformed: it must list weight maps.')
    return section


def _check_beside(section: Mapping[str, Any]) -> None:
    """Refuse a section whose tensors beside an ordinary state dict, or digests of what is left out, cannot be such."""
    found = _BASE(section.get("base"), f'checkpoint["{KEY}"]["base"]')
    if found is None and section.get("weights") and section["version"] >= PLAIN:
        found = _BESIDE({key: section.get(key) for key in _BESIDE_FORMS}, f'checkpoint["{KEY}"]')
    if found is not None:
        raise CheckpointError(f"What training needs beside the weights is malformed: {found}.")


def check_order(checkpoint: Mapping[str, Any], section: Mapping[str, Any] | None) -> None:
    """Refuse to restore optimizer state by position that was saved in another order of parameters.

    Raises:
        CheckpointError: The file was written before :data:`ORDERED`, with weight maps.
    """
    if section and section["version"] < ORDERED and section["weights"] and checkpoint.get("optimizer_states"):
        raise CheckpointError(
            "This checkpoint was saved by an earlier version of lightning-peft, whose optimizers held parameters under weight "
            "maps in another order, so it cannot be resumed. Start anew from its weights: "
            "model = lightning_peft.load_from_checkpoint(ModelClass, path), then fit without ckpt_path."
        )


def check_counts(section: Mapping[str, Any]) -> None:
    """Refuse to bake a section that lists more or fewer weight maps of a method than it says the method had.

    Raises:
        CheckpointError: It does.
    """
    owners = [item["method"] for records in section["weights"].values() for item in records]
    for record in section.get("methods", ()):
        listed = owners.count(record["method"])
        if record.get("maps", listed) != listed:
            raise CheckpointError(
                f"{record['method']} had {record['maps']} weight maps when the checkpoint was saved, and it lists {listed} of "
                f'them: checkpoint["{KEY}"]["weights"] is damaged or was edited. Use another checkpoint.'
            )


def read_groups(section: Mapping[str, Any]) -> list[list[list[str]]]:
    """Return the names of the parameters in each group of each optimizer.

    Raises:
        CheckpointError: They are missing or malformed.
    """
    groups = section.get("groups")
    if not _is_nest(groups, depth=3):
        raise CheckpointError(f'checkpoint["{KEY}"]["groups"] is malformed: it must list names by optimizer and group.')
    return groups  # type: ignore[return-value]


def _is_nest(value: object, depth: int) -> bool:
    """Whether a value is lists of lists of strings, so many deep."""
    return isinstance(value, list) and all(isinstance(v, str) if depth == 1 else _is_nest(v, depth - 1) for v in value)


def _check_method(record: object, place: str) -> None:
    found = _METHOD({key: record.get(key) for key in _METHOD_FORMS} if isinstance(record, dict) else record, place)
    if found is not None:
        raise CheckpointError(f"The record of a method is malformed: {found}.")


_METHOD_FORMS = {"method": text, "name": text, "config": dict_of(anything), "steps": whole(), "maps": maybe(whole())}
_METHOD = fields(_METHOD_FORMS)
_BESIDE_FORMS = {"tensors": dict_of(anything), "seen": dict_of(whole())}
_BASE = maybe(dict_of(text))
_BESIDE = fields(_BESIDE_FORMS)


def _is_record(item: object) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("map"), str)
        and isinstance(item.get("method"), str)
        and isinstance(item.get("config"), dict)
        and isinstance(item.get("name", ""), str)
        and isinstance(item.get("enabled", True), bool)
    )


def rebuild_map(item: MapRecord) -> WeightMap:
    """Build the map a record describes, from an installed method only.

    Raises:
        CheckpointError: The method has no such map, or its arguments do not fit.
    """
    method = registry.find(item["method"])
    for candidate in method.weight_maps:
        if candidate.kind == item["map"]:
            try:
                rebuilt: WeightMap = candidate(**item["config"])
            except Exception as error:  # a map's author cannot foresee what stands in a damaged file
                raise CheckpointError(
                    f"The recorded arguments of the weight map {item['map']!r} do not fit: {error}"
                ) from error
            rebuilt.owner, rebuilt.method = item["method"], item.get("name", "")
            rebuilt.enabled = item.get("enabled", True)
            return rebuilt
    raise CheckpointError(f"The method {item['method']} has no weight map {item['map']!r}; upgrade the package that ships it.")


def bake_state_dict(state: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn the state dict of a module under weight maps into that of an ordinary module.

    Args:
        state: Tensors by training-time name.
        section: The library's part of the same checkpoint.

    Returns:
        Tensors by plain name, maps applied, masks last, layer parts in the weights.

    Raises:
        CheckpointError: A recorded tensor is missing, or has a shape its maps do not fit; or a layer part cannot go into a
            weight.
    """
    plain = dict(state)
    for name, records in section["weights"].items():
        value = plain.pop(stored_key(name), None)
        if not isinstance(value, Tensor):
            raise CheckpointError(f"The checkpoint records weight maps on {name}, but {stored_key(name)} is not in its state.")
        shape = value.shape
        for position, item in enumerate(records):
            weight_map = rebuild_map(item)
            prefix = map_prefix(name, position)
            own = {key.removeprefix(prefix): plain.pop(key) for key in list(plain) if key.startswith(prefix)}
            try:
                weight_map.take_precision(own)
                weight_map.load_state_dict(own)
                if weight_map.enabled:
                    with torch.no_grad():
                        value = weight_map.bake(value)
            except Exception as error:
                raise CheckpointError(f"The state of the weight map {item['map']!r} on {name} does not fit: {error}") from error
        if left := next((key for key in plain if key.startswith(maps_prefix(name))), None):
            raise CheckpointError(f"The checkpoint holds {left}, but lists no weight map on {name} that it belongs to.")
        if value.shape != shape:
            raise CheckpointError(f"The weight maps on {name} change its shape from {tuple(shape)} to {tuple(value.shape)}.")
        plain[name] = value
    part_states.merge(plain, section, section.get(part_states.WEIGHTS, ()))
    check_counts(section)
    return plain


@torch.no_grad()
def mount_state_dict(state: MutableMapping[str, Tensor], module: nn.Module) -> None:
    """Rename plain tensors in place so that they load strictly into a module under weight maps.

    Values go through the ``right_inverse`` of their maps, which keep their present parameters.
    """
    for mapped in mapped_tensors(module, every_name=True):
        if mapped.name not in state:
            continue
        value = state.pop(mapped.name)
        with shards.read_whole(*mapped.maps):
            state[stored_key(mapped.name)] = shards.spread_as(value, mapped.chain.enter(shards.whole(value)))
        for position, weight_map in enumerate(mapped.maps):
            for key, tensor in weight_map.state_dict().items():
                state[map_prefix(mapped.name, position) + key] = tensor


def training_tensors(stashed: Mapping[str, StashedTensor]) -> dict[str, dict[str, Tensor]]:
    """Return what a stash holds by plain name, and in it by training-time name."""
    found = {}
    for name, tensor in stashed.items():
        found[name] = {stored_key(name): tensor.value}
        for position, tensors in enumerate(tensor.states):
            found[name] |= {map_prefix(name, position) + key: value for key, value in tensors.items()}
    return found


def check_names(state: object) -> None:
    """Refuse a state dict that is none.

    Raises:
        CheckpointError: It is no mapping of names to tensors.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f'checkpoint["state_dict"] is a {type(state).__name__}, not a mapping of names to tensors.')


def check_tensors(state: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse a state dict whose tensors cannot be the module's, before anything of it is copied.

    Lightning copies tensor by tensor, so a wrong shape in the middle would leave the module half loaded.

    Raises:
        CheckpointError: A tensor has another shape.
    """
    own = module.state_dict()
    sized = {
        map_prefix(mapped.name, position) + key
        for mapped in mapped_tensors(module, every_name=True)
        for position, weight_map in enumerate(mapped.maps)
        for key in weight_map.sized_by_file
    }
    free = {name for name in sized if not shards.is_shard(own.get(name))}  # what is spread over processes keeps its size
    for name, value in state.items():
        if not isinstance(value, Tensor) or name.endswith("_extra_state") or name in free:
            continue  # modules read their own extra state, whatever its shape
        if name in own and isinstance(own[name], Tensor) and own[name].shape != value.shape:
            cure = (
                "the weights that its fit began with, for shards keep their size"
                if name in sized
                else "the arguments it was saved with"
            )
            raise CheckpointError(
                f"The checkpoint holds {name} with shape {tuple(value.shape)}; this model has {tuple(own[name].shape)}. Build "
                f"the model with {cure}."
            )


def difference(section: Mapping[str, Any], tensors: Sequence[MappedTensor]) -> str | None:
    """Say how the recorded weight maps differ from those attached now; ``None`` when they agree."""
    then = {name: [item["map"] for item in records] for name, records in section["weights"].items()}
    now = {mapped.name: [weight_map.kind for weight_map in mapped.maps] for mapped in tensors}
    if then == now:
        return None
    for name in [*then, *now]:
        if then.get(name) != now.get(name):
            return f"{name} had {_list(then.get(name))} when it was saved and has {_list(now.get(name))} now"
    return None


def restore_switches(section: Mapping[str, Any], tensors: Sequence[MappedTensor]) -> None:
    """Switch weight maps on and off as the records of a section say, which are of the same maps."""
    for mapped in tensors:
        for weight_map, record in zip(mapped.maps, section["weights"][mapped.name], strict=True):
            weight_map.enabled = record.get("enabled", True)


def _list(kinds: list[str] | None) -> str:
    return " then ".join(kinds) if kinds else "no weight map"

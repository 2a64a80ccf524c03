"""Making a width edit: what a declaration of axes means for each tensor, number and configuration of a network."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.network.layers import has_class, is_conv, is_linear, own_parameters
from lightning_peft.structure.axes import NEW, OLD, size
from lightning_peft.structure.bounds import EPSILONS
from lightning_peft.structure.edit_types import ResizeEdit, ResizeEntry
from lightning_peft.structure.noted_numbers import ROOT, root_change, root_ratio
from lightning_peft.structure.width_map import Layer, Norm, Scale, WidthMap
from lightning_peft.structure.width_targets import grown_axes
from lightning_peft.weights.maps import plain_tensors, split_name


def width_edit(network: nn.Module, prefix: str, width_map: WidthMap, to: Mapping[str, int]) -> ResizeEdit:
    """Describe the growth of a network's axes.

    Args:
        network: The network.
        prefix: Its qualified name in the module that the edit will be applied to; ``""`` for the module itself.
        width_map: Its declaration.
        to: New number of units by axis. Left out, ``"heads"`` (with the key-value heads in their old proportion) and ``"ffn"``
            keep their ratio to ``"width"``, and every other axis stays.

    Returns:
        The edit, plain data by qualified name. A tied tensor stands under one name, with the others in ``"tied"``.

    Raises:
        MisconfigurationException: A target is impossible, or the declaration does not fit the network.

    Example:
        >>> hidden = {"0": Layer(output="hidden"), "2": Layer(input="hidden")}
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> width_edit(net, "", WidthMap({"hidden": 4}, hidden), {"hidden": 6})["attributes"]
        {'0': {'out_features': [4, 6]}, '2': {'in_features': [4, 6]}}
    """
    # The declaration speaks of axes, the edit of tensors and numbers: it must hold all that a process which never saw the
    # declaration needs to do the same. So each tensor stands with both shapes, and with the axes of its dimensions for the
    # operator that fills it; a tied tensor stands once, or it would be filled twice. What the declaration does not cover is an
    # error before anything is written down: a layer that was forgotten would keep its old size.
    axes = grown_axes(width_map, to)
    edit: ResizeEdit = {
        "op": "resize",
        "path": prefix,
        "axes": axes,
        "tensors": {},
        "attributes": {},
        "config": {},
        "norms": {},
        "inputs": {},
        "eps_config": "",
    }
    entries = _entries(network, width_map)
    _check_known(network, width_map, entries)
    tensors = plain_tensors(network)
    for name, entry in _without_ties(tensors, entries).items():
        entry["dims"] = [dim or str(n) for dim, n in zip(entry["dims"], tensors[name].shape, strict=True)]
        entry |= {key: [size(dim, axes, when) for dim in entry["dims"]] for key, when in (("from", OLD), ("to", NEW))}
        if entry["from"] != list(tensors[name].shape):
            raise MisconfigurationException(
                f"{name} has the shape {tuple(tensors[name].shape)}; the width map says {entry['dims']} = {entry['from']}. "
                "Correct its sizes or patterns."
            )
        if entry["from"] != entry["to"]:
            for key in {"of", "tied"} & set(entry):
                entry[key] = [_join(prefix, other) for other in entry[key]]
            edit["tensors"][_join(prefix, name)] = cast(ResizeEntry, entry)
    _note_factors(network, width_map, edit)
    _note_attributes(network, width_map, edit)
    _note_config(network, width_map, edit)
    for path, layer, kind in _declared(network, width_map):
        if isinstance(kind, Layer) and kind.input:
            edit["inputs"][_join(prefix, path)] = kind.input
        elif isinstance(kind, Norm) and (own_parameters(layer) or hasattr(layer, "normalized_shape")):
            edit["norms"][_join(prefix, path)] = _norm(layer, kind, _join(prefix, path.rpartition(".")[0]))
    # The configuration's epsilon is that of the norms only if all of them have it; an operator that scales it asks.
    if {getattr(vars(network).get("config"), width_map.eps_config, None)} == {
        n["eps"][1] for n in edit["norms"].values() if "eps" in n
    }:
        edit["eps_config"] = width_map.eps_config
    return edit


def _match(patterns: Mapping[str, Any], name: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _declared(network: nn.Module, width_map: WidthMap) -> Iterator[tuple[str, nn.Module, Layer | Norm | Scale | None]]:
    for path, layer in network.named_modules(remove_duplicate=False):
        pattern = _match(width_map.layers, path)
        if pattern is not None:
            yield path, layer, width_map.layers[pattern]


def _entries(network: nn.Module, width_map: WidthMap) -> dict[str, dict[str, Any]]:
    """The declared axes of each tensor, by name relative to the network."""
    entries: dict[str, dict[str, Any]] = {}
    for path, layer, kind in _declared(network, width_map):
        for attribute, tensor in own_parameters(layer).items() if kind is not None else ():
            entry = _entry(layer, kind, attribute, tensor)
            if isinstance(kind, Scale):
                parent = path.rpartition(".")[0]
                entry["of"] = [_join(_join(parent, kind.of), name) for name in ("weight", "bias")]
            elif isinstance(kind, Norm) and kind.before:
                entry["tied_head"] = _is_tied(network, f"{kind.before}.weight")
            if isinstance(kind, Norm) and kind.offset and attribute == "weight":
                entry["offset"] = kind.offset
            entries[_join(path, attribute)] = entry
    for name, tensor in plain_tensors(network).items():
        pattern = _match(width_map.tensors, name)
        what = width_map.tensors[pattern] if pattern is not None and name not in entries else None
        if isinstance(what, Layer):
            entries[name] = _entry(network, what, name, tensor)
        elif what is not None:
            entries[name] = {"role": "embedding", "dims": list(what), "input": None}
    return entries


def _entry(layer: nn.Module, kind: Layer | Norm | Scale | None, attribute: str, tensor: Tensor) -> dict[str, Any]:
    rest = [""] * (tensor.ndim - 1)
    if isinstance(kind, Norm):
        return {"role": f"norm_{attribute}", "dims": [kind.dim, *rest], "input": None}
    if isinstance(kind, Scale):
        return {"role": "scale", "dims": [kind.dim, *rest], "input": None}
    assert isinstance(kind, Layer)
    if tensor.ndim == 1:
        return {"role": "bias", "dims": [kind.output], "input": None}
    if isinstance(layer, nn.Embedding):
        return {"role": "embedding", "dims": ["", kind.output], "input": None}
    transposed = has_class(layer, "Conv1D")
    dims = [kind.input, kind.output] if transposed else [kind.output, kind.input, *rest[1:]]
    return {"role": "weight", "dims": dims, "input": (0 if transposed else 1) if kind.input else None}


def _is_tied(network: nn.Module, name: str) -> bool:
    tensors = plain_tensors(network)
    return name in tensors and sum(other is tensors[name] for other in tensors.values()) > 1


def _without_ties(tensors: Mapping[str, Tensor], entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One entry a tensor: as an embedding where it is one, else under its first name."""
    names: dict[int, list[str]] = {}
    for name in [name for name in tensors if name in entries]:
        names.setdefault(id(tensors[name]), []).append(name)
    single = {}
    for group in names.values():
        first = next((name for name in group if entries[name]["role"] == "embedding"), group[0])
        if any(entries[name]["dims"] != entries[first]["dims"] for name in group):
            raise MisconfigurationException(
                f"{', '.join(group)} are one tensor, which the width map describes in several ways."
            )
        others = [name for name in group if name != first]
        single[first] = entries[first] | ({"tied": others} if others else {})
    return single


def _check_known(network: nn.Module, width_map: WidthMap, entries: Mapping[str, Any]) -> None:
    kept = [path for path, _, kind in _declared(network, width_map) if kind is None]
    unknown = [
        name
        for name in plain_tensors(network)
        if name not in entries and _match(width_map.tensors, name) is None and split_name(name)[0] not in kept
    ]
    if unknown:
        raise MisconfigurationException(
            f"The width map does not know {', '.join(unknown[:8])}{' ...' if len(unknown) > 8 else ''} of "
            f"{type(network).__name__}. Give a WidthMap with patterns for them in layers= or tensors=; None keeps one as it is."
        )


def _note_factors(network: nn.Module, width_map: WidthMap, edit: ResizeEdit) -> None:
    """Note what makes up for another root of the width on an embedding, and behind it where a head shares its weight.

    The embedding is divided by what its root grows by. A head that is tied to it is divided too, so the norm before it is
    multiplied.
    """
    heads = {f"{kind.before}.weight": path for path, _, kind in _declared(network, width_map) if isinstance(kind, Norm)}
    for path, layer, kind in _declared(network, width_map):
        entry = edit["tensors"].get(_join(edit["path"], f"{path}.weight"))
        if not isinstance(kind, Layer) or not kind.root or entry is None:
            continue
        sizes = (size(kind.output, edit["axes"], OLD), size(kind.output, edit["axes"], NEW))
        entry["factor"] = root_ratio(layer, kind.root, own_parameters(layer)["weight"].dtype, sizes)
        for head, norm in heads.items():
            before = edit["tensors"].get(_join(edit["path"], f"{norm}.weight"))
            if before is not None and _join(edit["path"], head) in entry.get("tied", ()):
                before["factor"] = 1.0 / entry["factor"]


def _note_attributes(network: nn.Module, width_map: WidthMap, edit: ResizeEdit) -> None:
    found: dict[str, dict[str, Any]] = {}
    for path, layer, kind in _declared(network, width_map):
        found[path] = _torch_attributes(layer, kind)
    for path, layer in network.named_modules():
        pattern = _match(width_map.attributes, path)
        wanted = width_map.attributes[pattern] if pattern is not None else {}
        own = {*vars(layer), *layer._buffers}
        found[path] = found.get(path, {}) | {key: dim for key, dim in wanted.items() if key in own}
    for path, wanted in found.items():
        layer = network.get_submodule(path)
        changes = {key: _change(f"{path or 'network'}.{key}", layer, key, dim, edit) for key, dim in wanted.items()}
        changes = {key: change for key, change in changes.items() if change[OLD] != change[NEW]}
        if changes:
            edit["attributes"][_join(edit["path"], path)] = changes


def _torch_attributes(layer: nn.Module, kind: Layer | Norm | Scale | None) -> dict[str, Any]:
    if isinstance(kind, Norm):
        return {"normalized_shape": [kind.dim]} if hasattr(layer, "normalized_shape") else {}
    if not isinstance(kind, Layer):
        return {}
    if isinstance(layer, nn.Embedding):
        return {"embedding_dim": kind.output} if kind.output else {}
    names = ("nx", "nf") if has_class(layer, "Conv1D") else ("in_features", "out_features")
    names = ("in_channels", "out_channels") if is_conv(layer) else names
    known = is_conv(layer) or is_linear(layer)
    return {name: dim for name, dim in zip(names, (kind.input, kind.output), strict=True) if dim and known}


def _change(what: str, layer: nn.Module, key: str, dim: str | Sequence[str], edit: Mapping[str, Any]) -> list[Any]:
    """Old and new value of a number or tuple."""
    axes, value = edit["axes"], getattr(layer, key)
    change: list[Any]
    if isinstance(dim, str) and dim.startswith(ROOT):
        product = dim.removeprefix(ROOT)
        root = root_change(layer, key, (size(product, axes, OLD), size(product, axes, NEW)))
        fits, change = root is not None, root or [f"the root of {size(product, axes, OLD)}"]
    elif isinstance(dim, str):
        old, new = (size(dim, axes, when) for when in (OLD, NEW))
        fits, change = value == old, [old, new]
    else:
        change = [[size(part, axes, when) for part in dim] for when in (OLD, NEW)]
        fits = list(value) == change[OLD]
    if not fits:
        raise MisconfigurationException(f"{what} is {value}; the width map says {dim} = {change[OLD]}. Correct the map.")
    return change


def _note_config(network: nn.Module, width_map: WidthMap, edit: ResizeEdit) -> None:
    config = vars(network).get("config")
    for key, dim in width_map.config.items() if config is not None else ():
        value, (old, new) = getattr(config, key), [size(dim, edit["axes"], when) for when in (OLD, NEW)]
        if value is None:  # stands for a multiple of the width
            width = edit["axes"]["width"]
            if new * width[OLD] != old * width[NEW]:
                edit["config"][key] = [None, new]
            continue
        if value != old:
            raise MisconfigurationException(f"config.{key} is {value}; the width map says {dim} = {old}. Correct the map.")
        if old != new:
            edit["config"][key] = [old, new]


def _norm(layer: nn.Module, kind: Norm, parent: str) -> dict[str, Any]:
    cls = next(base.__name__ for base in type(layer).__mro__ if "Parametrized" not in base.__name__)
    eps = next((name for name in EPSILONS if isinstance(getattr(layer, name, None), float)), None)
    found: dict[str, Any] = {"dim": kind.dim, "kind": "rms" if "rms" in cls.lower() else "layer", "post": kind.post}
    found |= {"offset": kind.offset} if kind.offset else {}
    found |= {"of": [_join(_join(parent, kind.of), name) for name in ("weight", "bias")]} if kind.of else {}
    return found | ({} if eps is None else {"eps": [eps, getattr(layer, eps)]})


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name

"""Opening what is to be merged: state dicts, checkpoints, safetensors, folders; tensors are mapped, not read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.baking.bake import baked
from lightning_peft.baking.baked_folder import read_safetensors, read_tensors
from lightning_peft.baking.manifest import MANIFEST, read_manifest
from lightning_peft.baking.reading import harmless_objects, read_checkpoint, readable
from lightning_peft.deltas.peft_files import CONFIG
from lightning_peft.merging import adapters, checkpoints
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal

Source = str | Path | Mapping[str, Any] | Model

_INDEX = "model.safetensors.index.json"


def open_model(source: Source, label: str = "", *, base: Model | None = None, trusted: bool = False) -> Model:
    """Open a model.

    Args:
        source: A model that is open already, a state dict, or a path: a checkpoint of Lightning, with methods or without, a
            folder of its shards; a file that ``torch.save`` made of a state dict; a file of safetensors; a folder of Hugging
            Face, of :func:`lightning_peft.save_baked`, of an adapter of PEFT.
        label: What messages call a state dict.
        base: The model it was trained from, which adapters and checkpoints of trained tensors alone are nothing without.
        trusted: Whether Python objects in a checkpoint may be rebuilt, which can run any code.

    Raises:
        CheckpointError: The file is damaged, holds Python objects and is not trusted, or is of another kind.
        FileNotFoundError: There is no such file.
        MergeError: The folder holds no model.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, Mapping):
        return _of_state(source, label)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.is_dir() and not (path / ".metadata").is_file():
        return _of_folder(path, base, trusted)
    if path.suffix == ".safetensors":
        return _of_state(read_safetensors(path), str(path))
    return _of_file(path, base, trusted)


def open_models(sources: object, base: Model | None, *, trusted: bool = False) -> list[Model]:
    """Open the models of a merge.

    Args:
        sources: A list of what :func:`open_model` takes.
        base: The model that they were trained from, if it is known.
        trusted: See there.

    Raises:
        MergeError: It is no list, or an empty one; see also there.
    """
    if isinstance(sources, (str, Path, Mapping)) or not isinstance(sources, Sequence):
        raise MergeError(f"merge takes a list of models, not one {type(sources).__name__}. Put the models into a list.")
    if not sources:
        raise MergeError("There is no model to merge: the list is empty.")
    return [open_model(source, f"model {place}", base=base, trusted=trusted) for place, source in enumerate(sources, 1)]


def _of_state(state: Mapping[str, Any], label: str, **more: Any) -> Model:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise MergeError(f"{label} holds no tensors.")
    if strange := next((name for name in tensors if not isinstance(name, str)), None):
        raise MergeError(f"{label} has {strange!r} for the name of a tensor.")
    if odd := next((name for name, value in tensors.items() if value.layout != torch.strided or value.is_meta), None):
        raise MergeError(f"{odd} of {label} is packed, sparse or without data. Merge models before they are packed.")
    others = {name: value for name, value in state.items() if name not in tensors}
    return Model(label, tensors, others=others, **more)


def _of_file(path: Path, base: Model | None, trusted: bool) -> Model:
    loaded = _load(path, trusted)
    if not isinstance(loaded.get("state_dict"), Mapping):
        return _of_state(loaded, str(path))
    if (found := checkpoints.lazily_baked(loaded, str(path), base)) is not None:
        return _of_state(found.state, str(path), rest=found.rest, computed=found.computed)
    whole = baked(loaded)
    state = whole.pop("state_dict")
    return _of_state(state, str(path), rest=whole)


def _load(path: Path, trusted: bool) -> Mapping[str, Any]:
    """Read a file of torch, its tensors mapped."""
    if path.is_dir():
        return read_checkpoint(path, trusted=trusted)
    with readable(path, trusted), harmless_objects():
        # Files of torch before 1.6 are none, and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=not trusted, mmap=zipfile.is_zipfile(path))
    if not isinstance(loaded, Mapping):
        raise MergeError(f"{path} holds a {type(loaded).__name__}, no state dict and no checkpoint.")
    return loaded


def _of_folder(path: Path, base: Model | None, trusted: bool) -> Model:
    if (path / CONFIG).is_file():
        return adapters.opened(path, base)
    if (path / MANIFEST).is_file():
        found = read_manifest(path)
        return _of_state(read_tensors(path, found), str(path), folder=path, rest=_history(found))
    if (path / _INDEX).is_file():
        parts = [read_safetensors(path / file) for file in sorted(set(_index(path / _INDEX).values()))]
        return _of_state({name: value for part in parts for name, value in part.items()}, str(path), folder=path)
    if (path / "model.safetensors").is_file():
        return _of_state(read_safetensors(path / "model.safetensors"), str(path), folder=path)
    if (path / "pytorch_model.bin").is_file():
        return _of_state(_load(path / "pytorch_model.bin", trusted), str(path), folder=path)
    raise MergeError(
        f"{path} is no folder of a model: it has neither model.safetensors, alone or in parts with {_INDEX}, nor "
        "pytorch_model.bin, nor an adapter of PEFT, nor shards of a checkpoint."
    )


def _history(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of a baked folder says, as checkpoints have it."""
    section = {"version": files.FORMAT, "methods": found["methods"], "weights": {}}
    if edits := journal.read(found):
        section["journal"] = journal.write(edits)
    return {"hyper_parameters": dict(found.get("hyper_parameters") or {}), files.KEY: section}


def _index(path: Path) -> dict[str, str]:
    """Read which file holds which tensor; only names of files in the same folder are believed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) and Path(file).name == file for file in found.values()):
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise MergeError(f"{path} is damaged: it does not say which file of its folder holds which tensor. Copy it again.")

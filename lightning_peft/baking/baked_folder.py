"""A baked model as a folder: weights in ``model.safetensors``, and ``manifest.json``, which says how they came about."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.atomic_files import check_unused, whole_folder
from lightning_peft.attaching import method_records
from lightning_peft.baking.bake import bake, baked, read_checkpoint
from lightning_peft.baking.manifest import FORMAT as FORMAT
from lightning_peft.baking.manifest import MANIFEST, WEIGHTS, file_digest, manifest, read_manifest, record
from lightning_peft.baking.restore import restore
from lightning_peft.contract import Contract, methods_of, ordered
from lightning_peft.namespaces import both
from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal
from lightning_peft.structure.edit_types import Edit


def save_baked(
    source: nn.Module | str | Path, folder: str | Path, *, methods: Iterable[Contract] | None = None, trusted: bool = False
) -> Path:
    """Write a baked model as safetensors with a manifest; nothing in the folder is pickled.

    Args:
        source: A module, in training, trained or baked (it stays as it is), or a checkpoint file.
        folder: Folder to write; it must not exist or be empty, and appears only when it is complete.
        methods: Methods to record for a module; by default those of its Trainer. A checkpoint has its own record.
        trusted: Whether Python objects in a checkpoint may be rebuilt; see
            :func:`~lightning_peft.baking.reading.read_checkpoint`. None of them reaches the folder.

    Returns:
        ``folder``.

    Raises:
        CheckpointError: The checkpoint is damaged, or holds Python objects and is not trusted.
        OSError: The disk is full, or nothing may be written there.
        MisconfigurationException: safetensors is missing, the folder is in use, or the module saves something else than
            tensors.
    """
    _require_safetensors()
    folder = Path(folder)
    check_unused(folder)  # before the work
    found = _of_module(source, methods) if isinstance(source, nn.Module) else _of_checkpoint(Path(source), trusted)
    tensors, tied = untied(found.state)
    with whole_folder(folder) as part:
        save_tensors(tensors, part / WEIGHTS)
        history = journal.write(found.edits) if found.edits else None
        text = manifest(tensors, tied, found.methods, history, found.hyper_parameters, part / WEIGHTS)
        (part / MANIFEST).write_text(json.dumps(text, indent=1, allow_nan=False), encoding="utf-8")
        (part / WEIGHTS).chmod((part / MANIFEST).stat().st_mode)  # safetensors lets nobody else read its file
    return folder


def load_baked(module: nn.Module, folder: str | Path, *, strict: bool = True) -> dict[str, Any]:
    """Load what :func:`save_baked` wrote into a module, which ends up as the saved one was, grown if it was.

    The digests find damage, not malice: whoever can write the folder can write fitting digests. Nothing in it is executed.

    Args:
        module: What the user's class builds.
        folder: The folder.
        strict: Whether names and types of tensors must agree.

    Returns:
        The manifest.

    Raises:
        CheckpointError: The folder is damaged or does not fit; the module is as before.
        FileNotFoundError: There is no such folder.
        MisconfigurationException: safetensors is missing, or weight maps stand on the module.
    """
    found = read_manifest(folder)
    state = read_tensors(folder, found)
    restore(module, state, journal.read(found), strict=strict)
    return found


def read_tensors(folder: str | Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of a folder by name, tied ones under each of theirs, after comparing every digest.

    Args:
        folder: The folder.
        found: Its manifest.

    Raises:
        CheckpointError: The file is not the one the manifest describes.
        FileNotFoundError: There is no such file.
        MisconfigurationException: safetensors is missing.
    """
    _require_safetensors()
    path = Path(folder) / WEIGHTS  # never a name from the manifest, which could point elsewhere
    if not path.is_file():
        raise FileNotFoundError(f"There is no {WEIGHTS} in {folder}.")
    if file_digest(path) != found["file"]["sha256"]:
        raise files.CheckpointError(f"{path} is damaged: its sha256 is not that in {MANIFEST}. Copy or save the model again.")
    tensors = read_safetensors(path)
    expected = found["tensors"]
    if set(tensors) != set(expected):
        raise files.CheckpointError(
            f"{path} and its {MANIFEST} name other tensors: {sorted(set(tensors) ^ set(expected))[:4]}."
        )
    for name, tensor in tensors.items():
        own = record(tensor)
        wrong = [key for key in ("dtype", "shape", "sha256") if own[key] != expected[name].get(key)]
        if wrong:
            raise files.CheckpointError(f"{path} does not hold {name} as its {MANIFEST} says: {', '.join(wrong)} differ.")
    if strangers := [name for name in found["tied"].values() if name not in tensors]:
        raise files.CheckpointError(f"{Path(folder) / MANIFEST} ties tensors to {strangers[0]}, which is not in {WEIGHTS}.")
    return tensors | {name: tensors[other] for name, other in found["tied"].items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of safetensors; its tensors are mapped.

    Raises:
        CheckpointError: It is damaged.
        MisconfigurationException: safetensors is missing.
    """
    _require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise files.CheckpointError(f"{path} is not a readable safetensors file: {error}. Copy or save it again.") from error
    return tensors


@dataclass(frozen=True)
class _Baked:
    """A baked model, whatever it was read from."""

    state: Mapping[str, Any]
    edits: list[Edit]
    methods: list[dict[str, Any]]
    hyper_parameters: Mapping[str, Any]


def _of_module(module: nn.Module, methods: Iterable[Contract] | None) -> _Baked:
    if methods is None:
        trainer = module._trainer if isinstance(module, both(LightningModule)) else None
        methods = ordered(methods_of(trainer.callbacks)) if trainer is not None else ()  # type: ignore[attr-defined]
    records = [method_records.describe(method) for method in methods]
    hyper_parameters = dict(module.hparams) if isinstance(module, both(LightningModule)) else {}
    state = bake(deep_copy(module)).state_dict()
    return _Baked(state, journal.journal_of(module), records, hyper_parameters)


def _of_checkpoint(path: Path, trusted: bool) -> _Baked:
    checkpoint = baked(read_checkpoint(path, trusted=trusted))
    section = files.read(checkpoint)
    records = section["methods"] if section else []
    return _Baked(checkpoint["state_dict"], journal.read(section), records, checkpoint.get("hyper_parameters", {}))


def untied(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep each tensor once, since safetensors holds no two names of one; views of another tensor become their own.

    Args:
        state: A state dict.

    Returns:
        Tensors by name, and by their further names the first one.

    Raises:
        MisconfigurationException: Something in it is no tensor, or one that safetensors cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise MisconfigurationException(
                f"The module saves {name}, a {type(value).__name__}, beside its tensors; safetensors holds tensors only. Use "
                "lightning_peft.bake_checkpoint, or keep it out of state_dict()."
            )
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise MisconfigurationException(
                f"{name} is a {type(value).__name__} of layout {value.layout}, which safetensors cannot hold. Save before "
                "packing (semi_structured), quantising or sharding."
            )
        tensor = value.detach().cpu()
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and place in seen:
            tied[name] = seen[place]
            continue
        seen[place] = name
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = (tensor.clone() if storage in storages else tensor).contiguous()
        storages.add(storage)
    return tensors, tied


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that share no memory as safetensors.

    Args:
        tensors: They, by name.
        path: The file.
        metadata: What readers are told beside ``"format"``.

    Raises:
        OSError: The disk is full, or nothing may be written there.
        MisconfigurationException: safetensors is missing.
    """
    _require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # whatever the system said
        raise OSError(str(error)) from error


def _require_safetensors() -> None:
    if find_spec("safetensors") is None:
        raise MisconfigurationException('This needs safetensors. Install the extra: pip install "lightning-peft[export]".')

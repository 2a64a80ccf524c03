"""Writing a merged model: whole, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.arguments import as_plain
from lightning_peft.atomic_files import check_unused, whole, whole_folder
from lightning_peft.baking.baked_folder import save_tensors, untied
from lightning_peft.baking.manifest import MANIFEST, WEIGHTS, manifest
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model
from lightning_peft.structure import checkpoint as files

KEY = "lightning_peft_merge"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")


def checked(path: Path) -> Path:
    """Refuse a place that nothing can be written to, before the work.

    Raises:
        MergeError: Its ending is unknown.
        MisconfigurationException: It is a folder that is in use.
    """
    if path.suffix not in ("", ".ckpt", ".pt", ".pth", ".safetensors"):
        raise MergeError(f"{path} has an ending that says nothing: .ckpt, .pt, .safetensors, or none for a folder.")
    if not path.suffix:
        check_unused(path)
    elif path.is_dir():
        raise MergeError(f"{path} is a folder. Name a file, or a folder without an ending that does not exist yet.")
    return path


def like(base: Model | None, models: Sequence[Model]) -> Model:
    """Return the model whose checkpoint or folder gives what is no tensor: the base, unless it is tensors alone."""
    everything = [*([] if base is None else [base]), *models]
    return next((each for each in everything if each.rest or each.folder), everything[0])


def write(state: Mapping[str, Any], first: Model, path: Path, record: Mapping[str, Any]) -> None:
    """Write a merged model.

    Args:
        state: Its state dict.
        first: The model of :func:`like`, whose hyperparameters, configuration, tokenizer go along.
        path: File or folder.
        record: How it came about.

    Raises:
        OSError: The disk is full, or nothing may be written there; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: as_plain(value) for key, value in record.items()}
    if path.suffix == ".safetensors":
        with whole(path) as part:
            _save(state, part, plain)
    elif path.suffix:
        content = {**first.rest, "state_dict": dict(state), KEY: plain} if path.suffix == ".ckpt" else dict(state)
        with whole(path) as part, part.open("wb") as file:  # of a path torch.save would not say that a disk is full
            torch.save(content, file)
    else:
        with whole_folder(path) as folder:
            tensors, tied = _save(state, folder / WEIGHTS, plain)
            for other in [] if first.folder is None else first.folder.iterdir():
                if other.is_file() and not other.name.endswith(_WEIGHTS):
                    shutil.copyfile(other, folder / other.name)
            if first.folder is not None and (first.folder / MANIFEST).is_file():
                section = first.rest[files.KEY]
                history = section["methods"], section.get("journal"), first.rest["hyper_parameters"]
                text = manifest(tensors, tied, *history, folder / WEIGHTS)
                (folder / MANIFEST).write_text(json.dumps({**text, KEY: plain}, indent=1), encoding="utf-8")


def _save(state: Mapping[str, Any], path: Path, record: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, tied = untied({name: value for name, value in state.items() if isinstance(value, Tensor)})
    save_tensors(tensors, path, {KEY: json.dumps(record)})
    return tensors, tied

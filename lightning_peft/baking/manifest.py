"""The manifest beside a baked model's weights: what was done to them, and a digest of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from lightning_peft import __version__
from lightning_peft.network.tensor_bytes import tensor_bytes
from lightning_peft.structure.errors import CheckpointError

FORMAT = 1
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"

_LARGEST = 64_000_000  # bytes; a manifest of a million tensors is smaller


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's values, row-major, as they lie in memory on a little-endian machine.

    Example:
        >>> digest(torch.zeros(2))[:12] == hashlib.sha256(bytes(8)).hexdigest()[:12]
        True
    """
    return hashlib.sha256(tensor_bytes(tensor).cpu().numpy().data).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def record(tensor: Tensor) -> dict[str, Any]:
    """Describe a tensor."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "nonzeros": int(tensor.count_nonzero()),
        "sha256": digest(tensor),
    }


def manifest(
    tensors: Mapping[str, Tensor],
    tied: Mapping[str, str],
    methods: Sequence[Mapping[str, Any]],
    journal: Mapping[str, Any] | None,
    hyper_parameters: Mapping[str, Any],
    weights: Path,
) -> dict[str, Any]:
    """Build the manifest of a baked model.

    Args:
        tensors: Tensors of the file, by name.
        tied: Names that share the tensor of another name, and that name.
        methods: What was done, as checkpoints record it.
        journal: Structural changes, as checkpoints record them.
        hyper_parameters: The module's constructor arguments; those that are no plain data are left out.
        weights: The file of the tensors.
    """
    return {
        "format": FORMAT,
        "made_with": {"lightning_peft": __version__, "torch": str(torch.__version__), "lightning": str(lightning.__version__)},
        "methods": [json_data(method) for method in methods],
        "journal": journal,
        "hyper_parameters": {str(key): value for key, value in hyper_parameters.items() if _is_json(value)},
        "tensors": {name: record(tensor) for name, tensor in tensors.items()},
        "tied": dict(tied),
        "file": {"name": WEIGHTS, "bytes": weights.stat().st_size, "sha256": file_digest(weights)},
    }


def json_data(value: Any) -> Any:
    """Return a value as JSON would give it back; what JSON does not know becomes its ``str``.

    Example:
        >>> json_data({"rate": float("inf"), "shape": (1, 2)})
        {'rate': 'inf', 'shape': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): json_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_data(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    return value.tolist() if isinstance(value, Tensor) else str(value)


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a folder after checking its form.

    Raises:
        CheckpointError: It is damaged or of another format.
        FileNotFoundError: There is none.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"There is no {MANIFEST} in {folder}: save_baked did not write it, or not all of it.")
    if path.stat().st_size > _LARGEST:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than any manifest: it was not opened.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not a JSON document ({type(error).__name__}).") from error
    if not isinstance(found, dict) or type(found.get("format")) is not int:
        raise CheckpointError(f'{path} is not a manifest: it must be an object with an integer "format".')
    if found["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {found['format']}; this version of lightning-peft reads format {FORMAT}. Upgrade "
            "lightning-peft, or save the model again with the version that wrote it."
        )
    for key, fits in _FORM.items():
        if not fits(found.get(key)):
            raise CheckpointError(f'{path} is malformed: "{key}" is not as save_baked writes it.')
    return found


def _is_record(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and all(isinstance(item.get(key), str) for key in ("dtype", "sha256"))
        and isinstance(item.get("shape"), list)
    )


_FORM: dict[str, Callable[[Any], bool]] = {
    "tensors": lambda value: isinstance(value, dict) and all(map(_is_record, value.values())),
    "tied": lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value.values()),
    "file": lambda value: isinstance(value, dict) and isinstance(value.get("sha256"), str),
    "journal": lambda value: value is None or isinstance(value, dict),
    "methods": lambda value: isinstance(value, list),
}

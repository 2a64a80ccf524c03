"""Checkpoints that are folders of shards, laid out as Lightning does: tensors in torch's distributed format, the rest beside.

Every process writes its own shards, and any number of processes reads them. What comes back is what a file of whole tensors
would have held, in shards or whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.plain_state import with_versions
from lightning_peft.weights.shards import is_shard

REST = "meta.pt"
_BESIDE = "lightning_peft_tensors"
_MARK = "lightning_peft_tensor"
_NAMES = "lightning_peft_names"


def is_shard_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a checkpoint that is a folder of shards."""
    return Path(path, REST).is_file()


def write(checkpoint: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the tensors of a checkpoint into an empty folder; every process has to call.

    Args:
        checkpoint: The checkpoint; its tensors may be shards, wherever they stand in it.
        folder: The same in all processes.

    Returns:
        What one process has to write into the file :data:`REST`, without which the folder is no checkpoint.

    Raises:
        CheckpointError: A process could not write; all of them are told.
    """
    from lightning_peft.structure import distributed_format  # whose imports take longer than most commands have use for

    others = dict(checkpoint)
    state = others.pop("state_dict")
    first: dict[int, str] = {}
    shared = {name: other for name, value in state.items() if (other := first.setdefault(id(value), name)) != name}
    tensors = {"state_dict": {name: value for name, value in state.items() if name not in shared}}
    tensors |= {f"optimizer_{place}": held for place, held in enumerate(others.pop("optimizer_states", ()))}
    beside: dict[str, Tensor] = {}

    def taken_out(value: Any) -> Any:
        if not is_shard(value):
            return value
        beside[str(len(beside))] = value
        return {_MARK: str(len(beside) - 1)}

    rest: dict[str, Any] = tree_map(taken_out, others)
    distributed_format.write(tensors | ({_BESIDE: beside} if beside else {}), folder)
    names = tree_map(lambda _: None, tensors) | {"state_dict": with_versions({name: shared.get(name) for name in state}, state)}
    return rest | {_NAMES: names}


def read(
    folder: str | os.PathLike[str],
    empty: Callable[[torch.Size, torch.dtype], Tensor] = lambda size, dtype: torch.empty(size, dtype=dtype),
    *,
    trusted: bool = False,
) -> dict[str, Any]:
    """Return the checkpoint that a folder holds; no process waits for another.

    Args:
        folder: The folder.
        empty: Makes a tensor of a size and a type for what is read: of shards, a process reads its own alone. By default whole.
        trusted: Whether Python objects in it may be rebuilt, which can run any code.

    Raises:
        CheckpointError: It is damaged, or holds something that does not belong into such a folder.
    """
    from lightning_peft.structure import distributed_format

    rest = torch.load(Path(folder, REST), map_location="cpu", weights_only=not trusted)
    nested = distributed_format.read(folder, empty, trusted)
    beside = nested.pop(_BESIDE, {})

    def put_back(value: Any) -> Any:
        if not _is_mark(value):
            return value
        if value[_MARK] not in beside:
            raise CheckpointError(f"{folder} lacks a tensor that its {REST} names: files of several checkpoints were mixed.")
        return beside[value[_MARK]]

    checkpoint: dict[str, Any] = tree_map(put_back, rest, is_leaf=_is_mark)
    state = nested.pop("state_dict", {})
    names = checkpoint.pop(_NAMES, {"state_dict": dict.fromkeys(state), **dict.fromkeys(nested)})  # Lightning writes none
    shared = names.pop("state_dict")
    checkpoint["state_dict"] = with_versions({name: state[other or name] for name, other in shared.items()}, shared)
    tensors = {key: _in_order(nested.get(key, {}), below) for key, below in names.items()}
    states = [tensors[key] for place in range(len(tensors)) if (key := f"optimizer_{place}") in tensors]
    return checkpoint | ({"optimizer_states": states} if states else {})


def _in_order(found: Any, names: Any) -> Any:
    """Give nested tensors the order, and the keys that are no text, of those that were saved."""
    if not isinstance(names, dict):
        return found
    return {key: _in_order(found[str(key)], below) if str(key) in found else below for key, below in names.items()}


def _is_mark(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_MARK}

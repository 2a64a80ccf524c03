"""Checkpoints that are folders of shards, laid out as Lightning does: tensors in torch's distributed format, the rest beside.

Every process writes its own shards, and any number of processes reads them. What comes back is what a file of whole tensors
would have held, in shards or whole.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
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
    with _said_plainly(f"{folder} was not written"):
        save(tensors | ({_BESIDE: beside} if beside else {}), checkpoint_id=folder)
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
    rest = torch.load(Path(folder, REST), map_location="cpu", weights_only=not trusted)
    reader = _Reader(folder)
    found = reader.read_metadata()
    entries = found.state_dict_metadata.items()
    flat: dict[str, Any] = {
        key: empty(entry.size, entry.properties.dtype) if isinstance(entry, dcp_metadata.TensorStorageMetadata) else None
        for key, entry in entries
    }
    with _said_plainly(f"{folder} cannot be read"):
        _load_state_dict(flat, storage_reader=reader, planner=_Planner(trusted), no_dist=True)
    nested: dict[str, Any] = unflatten_state_dict(flat, found.planner_data or {key: (key,) for key in flat})
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


@contextlib.contextmanager
def _said_plainly(problem: str) -> Iterator[None]:
    """Raise what stopped some process as an ordinary error in all of them."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{problem}: process {rank} met {type(cause).__name__}, {cause}") from error


def _is_mark(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_MARK}


class _Reader(FileSystemReader):
    """Reads what torch writes, and rebuilds no other object that a file names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            found: dcp_metadata.Metadata = _Unpickler(file).load()
        places = {info.relative_path for info in found.storage_data.values()}
        if outside := sorted(place for place in places if Path(place).name != place):
            raise CheckpointError(f"{self.path} names the file {outside[0]}, which is not in it.")
        found.storage_meta = found.storage_meta or dcp_metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise CheckpointError(f"The folder's .metadata names {module}.{name}, which does not belong there: not opened.")
        return super().find_class(module, name)


_HOME = dcp_metadata.__name__
_KNOWN = {
    *((_HOME, name) for name, value in vars(dcp_metadata).items() if getattr(value, "__module__", "") == _HOME),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _Planner(DefaultLoadPlanner):
    def __init__(self, trusted: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._trusted = trusted

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=not self._trusted)

"""Tensors in torch's distributed format: every process writes its shards, and nothing else that a file names is rebuilt."""

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
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_peft.structure.errors import CheckpointError


def write(tensors: Mapping[str, Any], folder: Path) -> None:
    """Write nested tensors into a folder; every process has to call.

    Args:
        tensors: The tensors, which may be shards, and plain data beside them.
        folder: The same in all processes.

    Raises:
        CheckpointError: A process could not write; all of them are told.
    """
    with _said_plainly(f"{folder} was not written"):
        # What is whole everywhere may differ, as statistics of batches do: of all processes the first one's, as in a file.
        save(dict(tensors), checkpoint_id=folder, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))


def read(folder: str | os.PathLike[str], empty: Callable[[torch.Size, torch.dtype], Tensor], trusted: bool) -> dict[str, Any]:
    """Return the nested tensors in a folder; no process waits for another.

    Args:
        folder: The folder.
        empty: Makes a tensor of a size and a type for what is read: of shards, a process reads its own alone.
        trusted: Whether Python objects beside the tensors may be rebuilt.

    Raises:
        CheckpointError: It is damaged, or names something that does not belong into such a folder.
    """
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
    return nested


@contextlib.contextmanager
def _said_plainly(problem: str) -> Iterator[None]:
    """Raise what stopped some process as an ordinary error in all of them."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{problem}: process {rank} met {type(cause).__name__}, {cause}") from error


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

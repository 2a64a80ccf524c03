"""What a block was called with, kept in memory up to a bound and on disk beyond it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple, overload

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

_BY_REFERENCE = (nn.Module, torch.Generator, type, FunctionType, BuiltinFunctionType, MethodType)


class BlockCall(NamedTuple):
    """What one call of a block was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Packed:
    """A call taken apart: tensors here or in a file, and the rest as bytes that never leave this process."""

    rest: bytes
    tensors: list[Tensor] | Path
    references: list[Any]


class RecordedCalls(Sequence[BlockCall]):
    """Calls in the order they were made; every look at one gives a fresh copy.

    A block may change what it is given, as attention with a cache does, so nothing of a call is shared with the network:
    tensors are copied to the CPU, and any other object is copied with the tensors in it. Modules and functions stay the
    objects they are.

    Args:
        memory: Bytes of tensors to keep in memory; the tensors of further calls go to files.
        folder: Where those files go; it exists, and whoever gives it removes it.

    Attributes:
        device: Where the tensors of a call are put when it is looked at.
    """

    def __init__(self, memory: int, folder: Path) -> None:
        self.device = torch.device("cpu")
        self._memory, self._folder = memory, folder
        self._used = 0
        self._calls: list[_Packed] = []

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> BlockCall: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[BlockCall]: ...
    def __getitem__(self, index: int | slice) -> BlockCall | Sequence[BlockCall]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        packed = self._calls[index]
        kept = packed.tensors
        tensors: list[Tensor] = torch.load(kept, weights_only=True) if isinstance(kept, Path) else kept
        fresh = [tensor.to(self.device, copy=not isinstance(kept, Path)) for tensor in tensors]
        return BlockCall(*_Unpacker(packed.rest, fresh, packed.references).load())

    def __iter__(self) -> Iterator[BlockCall]:
        return (self[place] for place in range(len(self)))

    @property
    def spilled(self) -> int:
        """Calls whose tensors are on disk."""
        return sum(isinstance(packed.tensors, Path) for packed in self._calls)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a copy of what a call is given.

        Raises:
            MisconfigurationException: An argument cannot be copied.
        """
        with torch.inference_mode(False):  # or the copies could never take part in a graph
            packer = _Packer()
            try:
                packer.dump((args, kwargs))
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise MisconfigurationException(
                    f"A block was called with something that cannot be copied ({error}), so its call cannot be repeated. Pass "
                    "it to the block as a tensor, or name blocks= that are called without it."
                ) from error
        size = sum(tensor.untyped_storage().nbytes() for tensor in packer.tensors)
        kept: list[Tensor] | Path = packer.tensors
        if self._used + size > self._memory:
            kept = self._folder / f"{len(self):08d}.pt"
            torch.save(packer.tensors, kept)
        else:
            self._used += size
        self._calls.append(_Packed(packer.bytes.getvalue(), kept, packer.references))

    def clear(self) -> None:
        """Forget all calls, and remove their files."""
        for packed in self._calls:
            if isinstance(packed.tensors, Path):
                packed.tensors.unlink()
        self._calls.clear()
        self._used = 0


class _Packer(pickle.Pickler):
    """Pickles a call without its tensors, which it copies, and without what stays the object it is."""

    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.references: list[Any] = []
        self._places: dict[int, int] = {}
        self._held: list[Tensor] = []  # an identity is of use only while its object lives

    def persistent_id(self, value: Any) -> tuple[str, int] | None:
        if isinstance(value, Tensor):
            if id(value) not in self._places:
                self._places[id(value)] = len(self.tensors)
                self._held.append(value)
                copied = value.detach().to("cpu", copy=True)
                self.tensors.append(copied)
            return "tensor", self._places[id(value)]
        if isinstance(value, _BY_REFERENCE):
            self.references.append(value)
            return "reference", len(self.references) - 1
        return None


class _Unpacker(pickle.Unpickler):
    """Puts a call together again."""

    def __init__(self, rest: bytes, tensors: list[Tensor], references: list[Any]) -> None:
        super().__init__(io.BytesIO(rest))
        self._tensors, self._references = tensors, references

    def persistent_load(self, name: tuple[str, int]) -> Any:
        kind, place = name
        return self._tensors[place] if kind == "tensor" else self._references[place]

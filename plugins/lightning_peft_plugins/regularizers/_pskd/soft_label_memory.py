"""A memory of one class distribution per dataset sample, in RAM or in a file of its own, that ranks can merge."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

Storage = Literal["auto", "ram", "mapped"]
AllGather = Callable[[Tensor], Tensor]

MAPPED_FROM = 2**30  # bytes from which "auto" uses a file
MERGE_BYTES = 2**26  # bytes one rank contributes to one collective of a merge
MOST_ROWS = 2**27  # a memory that grows past this was given identifiers, not positions


class SoftLabelMemory:
    """Class probabilities of every sample, with a bit that says whether a sample was seen.

    Args:
        size: Number of samples; ``None`` lets the memory grow with the largest index written.
        classes: Number of classes.
        dtype: Storage type; rows are read as float32.
        storage: ``"ram"``, ``"mapped"`` (a temporary file without a name, which disappears with the process however it ends),
            or ``"auto"``: a file from 1 GiB on.
        folder: Where the file lives.
    """

    def __init__(
        self,
        size: int | None,
        classes: int,
        *,
        dtype: torch.dtype = torch.float32,
        storage: Storage = "auto",
        folder: str | Path | None = None,
    ) -> None:
        self.fixed = size is not None
        self.classes = classes
        self.dtype = dtype
        self._storage = storage
        self._folder = folder
        self._rows = self._allocate(size or 0)
        self._seen = torch.zeros(size or 0, dtype=torch.bool)
        self._used = size or 0
        self._complete = False
        self._visits: list[Tensor] = []

    @property
    def size(self) -> int:
        """Number of samples: as given, or up to the largest index written."""
        return self._used

    @property
    def probabilities(self) -> Tensor:
        """The memory itself, shape ``(size, classes)``; zeros for samples not seen."""
        return self._rows[: self._used]

    @property
    def seen(self) -> Tensor:
        """Whether each sample has a distribution, shape ``(size,)``, bool."""
        return self._seen[: self._used]

    @property
    def nbytes(self) -> int:
        """Bytes of the distributions."""
        return self.probabilities.numel() * self.dtype.itemsize

    @property
    def mapped(self) -> bool:
        """Whether the distributions are in a file."""
        return self._is_mapped(len(self._rows))

    def read(self, index: Tensor) -> tuple[Tensor, int]:
        """Return what is remembered of samples.

        Args:
            index: Positions in the dataset, shape ``(batch,)``, int64, on the CPU.

        Returns:
            Distributions, shape ``(batch, classes)``, float32, zeros for samples not seen; and how many were seen.

        Raises:
            MisconfigurationException: An index is negative or beyond the size.
        """
        self._make_room(index)
        seen = index.shape[0] if self._complete else int(self._seen.index_select(0, index).count_nonzero())
        return self._rows.index_select(0, index).float(), seen

    def write(self, index: Tensor, probabilities: Tensor) -> None:
        """Remember distributions; a row that is not finite is left out, and of a sample given twice the last row stays.

        Args:
            index: Positions in the dataset, shape ``(batch,)``, int64, on the CPU.
            probabilities: Distributions, shape ``(batch, classes)``, on the CPU.

        Raises:
            MisconfigurationException: An index is negative or beyond the size.
        """
        self._make_room(index)
        if not math.isfinite(probabilities.sum().item()):
            finite = torch.isfinite(probabilities.sum(1))
            index, probabilities = index[finite], probabilities[finite]
        if len(set(index.tolist())) < len(index):
            last = _last_of_each(index)
            index, probabilities = index[last], probabilities[last]
        self._rows.index_copy_(0, index, probabilities.to(self.dtype))
        if not self._complete:
            self._seen.index_fill_(0, index, True)
        self._visits.append(index)

    def forget_visits(self) -> None:
        """Stop noting what was written so far for a later :meth:`merge`."""
        self._visits.clear()
        self._complete = self.fixed and bool(self.seen.all())  # from then on nobody counts

    def merge(self, all_gather: AllGather) -> None:
        """Exchange what ranks wrote since the last merge, so that all hold the same memory. All ranks must call it.

        Of a sample written on several ranks the latest write stays, and of simultaneous ones that of the highest rank.

        Args:
            all_gather: Turns a CPU tensor of one shape on all ranks into their stack, shape ``(ranks, *shape)``, on the CPU.
        """
        index, when = self._latest_visits()
        counts = all_gather(torch.tensor([len(index)]))
        length = int(counts.max())
        if length == 0:
            return
        indices = all_gather(_padded(index, length, -1))
        times = all_gather(_padded(when, length, -1))
        self._make_room(indices[indices >= 0])
        ranks = len(indices)
        keys = torch.where(indices >= 0, times * ranks + torch.arange(ranks)[:, None], -1)
        winners = torch.full((len(self._rows),), -1)
        winners.scatter_reduce_(0, indices.clamp(min=0).flatten(), keys.flatten(), "amax")
        wins = (keys >= 0) & (keys == winners[indices.clamp(min=0)])
        chunk = max(1, MERGE_BYTES // (self.classes * self.dtype.itemsize))
        mine = _padded(index, length, 0)
        for start in range(0, length, chunk):
            rows = all_gather(self._rows.index_select(0, mine[start : start + chunk]))
            for rank in range(ranks):
                take = wins[rank, start : start + chunk]
                self._rows.index_copy_(0, indices[rank, start : start + chunk][take], rows[rank][take])
        self._seen.index_fill_(0, indices[indices >= 0], True)
        self.forget_visits()

    def state(self) -> dict[str, Any]:
        """Return the memory as plain data; what is in RAM is copied."""
        rows = self.probabilities
        return {"fixed": self.fixed, "probabilities": rows if self.mapped else rows.clone(), "seen": self.seen.clone()}

    def load(self, probabilities: Tensor, seen: Tensor) -> None:
        """Take over saved distributions, one row a sample."""
        self._make_room(torch.tensor([len(seen) - 1]))
        self._rows[: len(seen)].copy_(probabilities)
        self._seen[: len(seen)].copy_(seen)

    def _latest_visits(self) -> tuple[Tensor, Tensor]:
        """Return the samples written here since the last merge, each once, and at which write."""
        if not self._visits:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        index = torch.cat(self._visits)
        when = torch.cat([torch.full((len(visit),), time) for time, visit in enumerate(self._visits)])
        last = _last_of_each(index)
        return index[last], when[last]

    def _is_mapped(self, rows: int) -> bool:
        large = rows * self.classes * self.dtype.itemsize >= MAPPED_FROM
        return self._storage == "mapped" or (self._storage == "auto" and large)

    def _allocate(self, rows: int) -> Tensor:
        if rows and self._is_mapped(rows):
            return _mapped_zeros(rows * self.classes, self.dtype, self._folder).view(rows, self.classes)
        return torch.zeros(rows, self.classes, dtype=self.dtype)

    def _make_room(self, index: Tensor) -> None:
        if index.numel() == 0:
            return
        low, high = (int(bound) for bound in index.aminmax())
        limit = self._used if self.fixed else MOST_ROWS
        if low < 0 or high >= limit:
            raise MisconfigurationException(
                f"Sample index {low if low < 0 else high} is outside the memory of {limit} samples. An "
                "index must be the sample's position in the training dataset, from 0; if the dataset is larger than it says, "
                "give its true size with num_samples=..."
            )
        self._used = max(self._used, high + 1)
        if high >= len(self._rows):
            rows, seen = self._allocate(max(high + 1, 2 * len(self._rows))), self._seen
            rows[: len(seen)].copy_(self._rows)
            self._rows, self._seen = rows, torch.zeros(len(rows), dtype=torch.bool)
            self._seen[: len(seen)].copy_(seen)


def fits_memory(state: dict[str, Any]) -> bool:
    """Say whether plain data from a file has the form of :meth:`SoftLabelMemory.state`."""
    rows, seen = state.get("probabilities"), state.get("seen")
    return (
        isinstance(rows, Tensor)
        and isinstance(seen, Tensor)
        and rows.ndim == 2
        and rows.is_floating_point()
        and seen.dtype == torch.bool
        and seen.shape == rows.shape[:1]
        and len(rows) <= MOST_ROWS
        and bool(rows.isfinite().all() and (rows >= 0).all())
        and isinstance(state.get("fixed"), bool)
    )


def _last_of_each(index: Tensor) -> Tensor:
    """Return the place of the last occurrence of each distinct value.

    Example:
        >>> _last_of_each(torch.tensor([7, 5, 7]))
        tensor([1, 2])
    """
    values, order = index.sort(stable=True)
    last = torch.ones(len(values), dtype=torch.bool)
    last[:-1] = values[1:] != values[:-1]
    return order[last]


def _padded(values: Tensor, length: int, filler: int) -> Tensor:
    return torch.cat([values, torch.full((length - len(values),), filler)])


def _mapped_zeros(numel: int, dtype: torch.dtype, folder: str | Path | None) -> Tensor:
    """Return zeros that live in a temporary file of ``folder``; the file is gone when the tensor is, or the process."""
    nbytes = numel * dtype.itemsize
    where = Path(folder or tempfile.gettempdir())
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where) as file:
            file.truncate(nbytes)
            if hasattr(os, "posix_fallocate"):  # a hole that finds no disk later would kill the process
                os.posix_fallocate(file.fileno(), 0, nbytes)
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=dtype)
    except OSError as error:
        raise MisconfigurationException(
            f"A memory of {nbytes / 2**30:.2f} GiB could not be mapped to a file in {where}: {error.strerror}. Free some disk, "
            'point Trainer(default_root_dir=...) to a larger one, or halve it with dtype="float16".'
        ) from error

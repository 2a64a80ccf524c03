"""The interface of a data module that can be evaluated under shift, and the test sets of a study."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_peft.registry import suggest


@runtime_checkable
class ShiftedData(Protocol):
    """A LightningDataModule whose test set also exists under shifts.

    :meth:`shifted` is called after ``prepare_data`` and ``setup("test")``. Its samples are of the kind that the ``collate_fn``
    of ``test_dataloader`` takes. An attribute ``shift_note``, if there is one, tells readers of a report where the shifts come
    from.
    """

    def shifts(self) -> Mapping[str, Sequence[int]]:
        """Names of the shifts and the severities each has, none for a natural shift."""

    def shifted(self, shift: str, severity: int) -> Dataset[Any]:
        """The test set under a shift; ``severity`` is 0 for a natural one."""

    def test_dataloader(self) -> DataLoader[Any]:
        """The clean test set; batch size, ``collate_fn`` and workers of every stream are taken from it."""


@dataclass(frozen=True)
class Part:
    """A test set of a study.

    Attributes:
        shift: Name of the shift, ``""`` for the clean test set.
        severity: Its severity, 0 for the clean test set and for natural shifts.

    Example:
        >>> str(Part("contrast", 5)), str(Part("rotten_tomatoes")), str(Part())
        ('contrast 5', 'rotten_tomatoes', 'clean')
    """

    shift: str = ""
    severity: int = 0

    def __str__(self) -> str:
        return f"{self.shift} {self.severity}".removesuffix(" 0") if self.shift else "clean"


CLEAN = Part()


def choose_parts(
    offered: Mapping[str, Sequence[int]], shifts: Sequence[str] = (), severities: Sequence[int] = ()
) -> list[Part]:
    """Choose the test sets of a study.

    Args:
        offered: What :meth:`ShiftedData.shifts` says.
        shifts: Shifts to take; all when empty.
        severities: Severities to take of those that have any; the highest when empty.

    Raises:
        MisconfigurationException: A shift or severity is not offered.

    Example:
        >>> choose_parts({"fog": (1, 2), "other_city": ()}, severities=[1])
        [Part(shift='fog', severity=1), Part(shift='other_city', severity=0)]
    """
    for shift in shifts:
        if shift not in offered:
            raise MisconfigurationException(f"The data has no shift {shift!r}.{suggest(shift, list(offered))}")
    parts = []
    for shift in shifts or offered:
        known = offered[shift]
        for severity in severities if known else (0,):
            if known and severity not in known:
                raise MisconfigurationException(f"{shift} has no severity {severity}; it has {', '.join(map(str, known))}.")
            parts.append(Part(shift, severity))
        if known and not severities:
            parts.append(Part(shift, max(known)))
    return parts


def data_digest(data: Dataset[Any]) -> str:
    """Return a digest of a data set's size and of its first and last sample, which tells most changes of files from none.

    Numbers, texts and tensors in a sample count; of other objects only their type does.

    Example:
        >>> a, b = [(1.0, "x"), (2.0, "y")], [(1.0, "x"), (2.5, "y")]
        >>> data_digest(a) == data_digest(list(a)), data_digest(a) == data_digest(b)
        (True, False)
    """
    size = len(data) if isinstance(data, Sized) else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a sample may be a random view
        return content_digest([size, *(data[place] for place in ((0, size - 1) if size else ()))])


def content_digest(content: Any) -> str:
    """Return a digest of the numbers, texts and tensors in nested lists, tuples and dicts; of other objects, of their types.

    Example:
        >>> content_digest({"a": torch.zeros(2)}) == content_digest({"a": torch.ones(2)})
        False
    """
    found = hashlib.sha256()
    for leaf in tree_leaves(content):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().cpu()
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy knows no bfloat16
        elif isinstance(leaf, np.ndarray):
            found.update(leaf.tobytes())
        else:
            found.update((repr(leaf) if isinstance(leaf, (str, int, float)) else type(leaf).__name__).encode())
    return found.hexdigest()

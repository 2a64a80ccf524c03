"""What a data module offers to be evaluated under shift, and the loader of one stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_peft.export.report_calibration import labels_of

if TYPE_CHECKING:
    from lightning_peft.shifts.streams import Episode


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
    from lightning_peft.registry import suggest

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


def labels_in(loader: DataLoader[Any], data: Dataset[Any]) -> Tensor:
    """Class indices of a test set, in its order.

    Args:
        loader: Template whose ``collate_fn`` makes batches of samples.
        data: The test set.

    Raises:
        MisconfigurationException: The labels cannot be told from the batches.
    """
    found = []
    for batch in DataLoader(data, batch_size=loader.batch_size, collate_fn=loader.collate_fn):
        labels = labels_of(batch)
        if labels is None:
            raise MisconfigurationException(
                "The labels of a test batch cannot be told. Make batches (inputs, labels), or mappings with a key 'labels'."
            )
        found.append(labels)
    return torch.cat(found)


def stream_loader(template: DataLoader[Any], sets: Mapping[Part, Dataset[Any]], episode: Episode) -> DataLoader[Any]:
    """Return the loader of one episode.

    No batch crosses a border between segments; a rest of less than half a batch joins the batch before it, because statistics
    of a few samples are none.

    Args:
        template: Where batch size, ``collate_fn`` and workers come from.
        sets: The test sets.
        episode: Which samples in which order.

    Raises:
        MisconfigurationException: The template has no batch size of its own.
    """
    if template.batch_size is None:
        raise MisconfigurationException(
            "test_dataloader() has no batch_size, so it makes its own batches. Give it a batch_size, so that streams in "
            "another order can be built from its dataset."
        )
    starts = torch.tensor([0, *(len(sets[part]) for part in episode.parts)]).cumsum(0)  # type: ignore[arg-type]
    batches: list[list[int]] = []
    for segment in episode.segments:
        places = starts[segment[:, 0]] + segment[:, 1]
        cut = [part.tolist() for part in torch.split(places, template.batch_size)]
        if len(cut) > 1 and 2 * len(cut[-1]) < template.batch_size:
            rest = cut.pop()
            cut[-1] = cut[-1] + rest
        batches += cut
    return DataLoader(
        ConcatDataset([sets[part] for part in episode.parts]),
        batch_sampler=batches,
        collate_fn=template.collate_fn,
        num_workers=template.num_workers,
    )

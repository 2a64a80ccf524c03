"""The loader of one stream, made after the pattern of a test loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_peft.network.labels import labels_of
from lightning_peft.shifts.data import Part
from lightning_peft.shifts.streams import Episode


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
                "The labels of a test batch cannot be found. Make batches (inputs, labels), or mappings with a key 'labels'."
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

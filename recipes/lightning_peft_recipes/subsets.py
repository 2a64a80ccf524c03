"""Deterministic, stratified subsets, independent of any random state."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def subset_count(subset: float | None, total: int) -> int:
    """Number of samples that ``subset`` asks for out of ``total``: a share in (0, 1), a count, or ``None`` for all.

    Example:
        >>> subset_count(0.5, 10), subset_count(4, 10), subset_count(99, 10), subset_count(None, 10)
        (5, 4, 10, 10)
    """
    if subset is None:
        return total
    if subset <= 0:
        raise MisconfigurationException(f"subset={subset} must be a share between 0 and 1, a positive count, or None")
    return min(total, max(1, round(subset * total)) if subset < 1 else int(subset))


def stratified(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Sorted indices of ``count`` samples with class shares as close to those of ``labels`` as whole numbers allow.

    Nested: for one ``seed`` a larger ``count`` only adds samples.

    Args:
        labels: Class indices, shape ``[samples]``.
        count: Number of samples to take.
        seed: Chooses which samples of a class come first.

    Example:
        >>> stratified(torch.tensor([0, 0, 0, 0, 1, 1]), 3).shape, stratified(torch.tensor([0, 0, 1, 1]), 4).tolist()
        (torch.Size([3]), [0, 1, 2, 3])
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        # Spread each class evenly over [0, 1): cutting that line anywhere keeps the shares.
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return position.argsort(stable=True)[:count].sort().values

"""The sparse envelope of groups: a convex penalty under which all but the k largest groups fade."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

_HALVINGS = 100  # of an interval of doubles: more would change nothing


def group_envelope(norms: Tensor, k: int) -> Tensor:
    """Sparse envelope of ``x``, the biconjugate of ``1/2 ||x||^2`` where at most ``k`` groups are not zero, infinite elsewhere.

    It is ``1/2 min_u sum_j ||x_j||^2 / u_j`` over ``0 <= u <= 1`` with ``sum u <= k``: ``1/2 ||x||^2`` for ``k`` groups or
    fewer, half the squared sum of norms for ``k = 1`` (Refael et al. 2022, arXiv 2212.12921; the definition is ours from their
    title property, see the method's card).

    Args:
        norms: Euclidean norm of each group, shape ``(groups,)``.
        k: Groups that are free.

    Returns:
        A scalar.

    Raises:
        MisconfigurationException: ``k`` is not positive.

    Example:
        >>> group_envelope(torch.tensor([3.0, 2.0, 1.0, 0.5]), 2)
        tensor(10.5625)
    """
    _check(k)
    if int(norms.count_nonzero()) <= k:
        return norms.square().sum() / 2
    values = norms.double()
    shares = _shares(values, torch.zeros_like(values), k)
    return (values.square()[values > 0] / shares[values > 0]).sum().to(norms.dtype) / 2


def group_envelope_scale(norms: Tensor, k: int, strength: Tensor | float) -> Tensor:
    """What the proximal operator of ``strength`` times the envelope multiplies each group by.

    ``u_j / (u_j + strength_j)`` with ``u_j = clip(sqrt(strength_j) ||v_j|| / s - strength_j, 0, 1)`` and ``s`` such that the
    ``u_j`` add up to ``k``.

    Args:
        norms: Euclidean norm of each group, shape ``(groups,)``.
        k: Groups that are free.
        strength: Positive number, or one a group.

    Returns:
        Factors in [0, 1], shape ``(groups,)``.

    Raises:
        MisconfigurationException: ``k`` or a strength is not positive.

    Example:
        >>> values = torch.tensor([3.0, 2.0, 1.0, 0.5])
        >>> values * group_envelope_scale(values, 2, 1.0)
        tensor([1.5000, 1.0000, 0.0000, 0.0000])
    """
    _check(k)
    strengths = torch.as_tensor(strength, dtype=torch.float64, device=norms.device).expand(norms.shape)
    if not (strengths > 0).all():
        raise MisconfigurationException("The envelope's strength must be positive; leave the method out for none.")
    if int(norms.count_nonzero()) <= k:
        return (1 / (1 + strengths)).to(norms.dtype)
    shares = _shares(norms.double() * strengths.sqrt(), strengths, k)
    shares = shares.where(shares > 1e-12, 0.0)  # what the bisection leaves of a group that is out
    return (shares / (shares + strengths)).to(norms.dtype)


def _shares(values: Tensor, offsets: Tensor, k: int) -> Tensor:
    """``clip(values / s - offsets, 0, 1)`` that add up to ``k``, by bisection of ``log s``."""

    def shares(log_s: Tensor) -> Tensor:
        return (values / log_s.exp() - offsets).clamp(0, 1)

    positive = values[values > 0]
    low = (positive / (1 + offsets[values > 0])).min().log() - 1  # all of them are 1 below
    high = (positive.sum() / k).log() + 1  # their sum is less than k above
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        more = shares(middle).sum() > k
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return shares(high)


def _check(k: int) -> None:
    if k < 1:
        raise MisconfigurationException(f"k={k}: at least one group stays free.")

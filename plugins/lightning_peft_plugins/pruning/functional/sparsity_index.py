"""How compressible a vector is: the PQ index, and how many of its entries it can do without."""

from __future__ import annotations

import math

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def pq_index(values: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """PQ index, ``1 - d^(1/q - 1/p) ||w||_p / ||w||_q`` (Diao et al., ICLR 2023, arXiv 2302.05601, definition 1).

    Args:
        values: Any tensor; its ``d`` entries are one vector.
        p: Order of the smaller norm, positive.
        q: Order of the larger, above ``p``.

    Returns:
        From 0, when all magnitudes are equal, towards 1, when one entry holds everything; 0 for a vector of zeros.

    Raises:
        MisconfigurationException: The orders are not ``0 < p < q``.

    Example:
        >>> import torch
        >>> round(pq_index(torch.tensor([2.0, 1.0, 0.0, 0.0])), 6)
        0.514298
    """
    if not 0 < p < q:
        raise MisconfigurationException(f"The PQ index needs orders 0 < p < q, got p={p}, q={q}.")
    magnitudes = values.detach().abs().flatten().double()
    largest = magnitudes.max() if len(magnitudes) else 0.0
    if not largest:
        return 0.0
    magnitudes = magnitudes / largest  # scale-free, and no power overflows
    small, large = (magnitudes.pow(order).sum().pow(1 / order).item() for order in (p, q))
    spread: float = len(magnitudes) ** (1 / q - 1 / p) * small / large
    return max(0.0, 1.0 - spread)


def pq_pruned(
    values: Tensor, p: float = 0.5, q: float = 1.0, *, eta: float = 0.0, gamma: float = 1.0, beta: float = 0.9
) -> int:
    """Count the entries that Sparsity-informed Adaptive Pruning removes in one round (Diao et al., ICLR 2023, algorithm 1).

    ``d (1 + eta)^(q / (p - q)) (1 - I)^(pq / (q - p))`` entries are a lower bound of those to keep (theorem 2).

    Args:
        values: What is left of a weight.
        p: See :func:`pq_index`.
        q: See :func:`pq_index`.
        eta: Relative loss of the norm that is tolerated.
        gamma: Factor of the share that goes.
        beta: Largest share that goes in one round.

    Example:
        >>> import torch
        >>> pq_pruned(torch.tensor([2.0, 1.0, 0.0, 0.0])), pq_pruned(torch.ones(4))
        (2, 0)
    """
    count = values.numel()
    if count == 0:
        return 0
    bound = count * (1 + eta) ** (q / (p - q)) * (1 - pq_index(values, p, q)) ** (p * q / (q - p))
    kept = math.ceil(bound - 1e-9 * count)  # equal magnitudes are all kept, whatever the rounding
    return int(count * min(max(gamma * (1 - kept / count), 0.0), beta) + 1e-6)

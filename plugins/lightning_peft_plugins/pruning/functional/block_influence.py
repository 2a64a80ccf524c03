"""Block influence: how far a block turns what passes through it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def block_influence(inputs: Tensor, outputs: Tensor, dim: int = -1) -> Tensor:
    """One minus the cosine of input and output, averaged over tokens (Men et al., 2024, arXiv 2403.03853).

    A block that passes its input on, scaled or not, has influence 0. A vector of zeros counts as turned by a right angle.

    Args:
        inputs: What the block was given, such as ``(batch, tokens, features)`` or ``(batch, channels, height, width)``.
        outputs: What it returned, of the same shape.
        dim: Dimension of the features; all others count as tokens.

    Returns:
        A scalar from 0 to 2, float32 or wider.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> block_influence(tokens, 2 * tokens), block_influence(tokens, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        (tensor(0.), tensor(0.5000))
    """
    wide = [values if values.dtype.itemsize >= 4 else values.float() for values in (inputs, outputs)]
    return 1.0 - F.cosine_similarity(*wide, dim=dim).mean()

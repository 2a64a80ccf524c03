"""How strongly LoRA-GGPO moves the rows of a weight."""

from __future__ import annotations

from torch import Tensor


def perturbation_spread(weight_norms: Tensor, gradient_norms: Tensor, sigma: float, beta: float) -> Tensor:
    """Standard deviations of the numbers that are added to the rows of a weight (Chang et al., LoRA-GGPO, 2025).

    Args:
        weight_norms: Norms of the rows of the weight with its delta, shape ``(..., outputs)``.
        gradient_norms: Norms of the rows of its gradient, the same shape.
        sigma: Weight of the former.
        beta: Weight of the squares of the latter.

    Returns:
        ``(sigma |W_i| + beta |G_i|^2) / sqrt(outputs)``, the same shape.

    Example:
        >>> import torch
        >>> perturbation_spread(torch.full((4,), 2.0), torch.full((4,), 3.0), 0.5, 0.1)
        tensor([0.9500, 0.9500, 0.9500, 0.9500])
    """
    return (sigma * weight_norms + beta * gradient_norms.square()) / weight_norms.shape[-1] ** 0.5

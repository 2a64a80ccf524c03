"""The factors of ALLoRA."""

from __future__ import annotations

from torch import Tensor

from lightning_peft_plugins.deltas.functional.thin_rows import row_norms


def row_rates(down: Tensor, up: Tensor, eta: float) -> Tensor:
    """Factors on the gradients of the rows of ``B A`` (Huang and Balestriero, ALLoRA, 2024).

    Args:
        down: ``A``, shape ``(..., rank, inputs)``.
        up: ``B``, shape ``(..., outputs, rank)``.
        eta: Factor of a row of zeros.

    Returns:
        ``1 / sqrt(|(B A)_i| + 1 / eta^2)``, shape ``(..., outputs)``.

    Example:
        >>> import torch
        >>> row_rates(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [0.75]]), 2.0)
        tensor([2.0000, 0.5000])
    """
    return (row_norms(down, up) + eta**-2).rsqrt()

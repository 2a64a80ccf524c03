"""How much each weight matters: magnitude, gradient, first-order Taylor, diagonal Fisher information."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.weights.fisher import diagonal_fisher

__all__ = ["diagonal_fisher", "gradient", "magnitude", "taylor"]


def magnitude(weight: Tensor) -> Tensor:
    """Absolute value of each weight.

    Example:
        >>> import torch
        >>> magnitude(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])
    """
    return weight.detach().abs()


def gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """Absolute gradient: how fast the loss changes when the weight does.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> gradient(torch.tensor([-2.0, 0.5]), torch.tensor([1.0, -3.0]))
        tensor([1., 3.])
    """
    _check_shapes(weight, grad)
    return grad.detach().abs()


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """First-order estimate of how much the loss changes when the weight is set to zero: ``|w g|``.

    Molchanov et al. (2019, arXiv:1906.10771) score with the square ``(w g)^2``, which ranks single weights the same.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> taylor(torch.tensor([-2.0, 0.5]), torch.tensor([1.0, -3.0]))
        tensor([2.0000, 1.5000])
    """
    _check_shapes(weight, grad)
    return (weight.detach() * grad.detach()).abs()


def _check_shapes(weight: Tensor, grad: Tensor) -> None:
    if weight.shape != grad.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and gradient {tuple(grad.shape)} differ in shape.")

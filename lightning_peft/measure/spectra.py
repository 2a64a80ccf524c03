"""What singular values say about the change of a matrix: effective rank, stable rank, intruder dimensions.

Decompositions are those of the smaller Gram matrix in double precision, several times as fast as those of a matrix in single
precision, and as exact for all but the smallest singular values: those below a millionth of the largest are not resolved.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP, THRESHOLD = 10, 0.5
"""Leading singular vectors that are looked at, and the cosine below which one is an intruder."""

_RESOLVED = 1e-6  # of the largest singular value; below it single precision rounds


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in descending order, in double precision on the CPU, the smaller dimension's number of them.

    Args:
        matrix: Shape ``(rows, columns)``, finite.

    Example:
        >>> singular_values(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]]))
        tensor([3., 2.], dtype=torch.float64)
    """
    squares: Tensor = torch.linalg.eigvalsh(_gram(_double(matrix)))
    return squares.clamp_min(0).sqrt().flip(0)


def effective_rank(singular_values: Tensor) -> float:
    """Exponential of the entropy of the singular values' shares of their sum (Roy & Vetterli, EUSIPCO 2007).

    It is ``k`` for ``k`` equal values and zeros, and less the more they differ; 0 where all are zero.

    Args:
        singular_values: In any order.

    Example:
        >>> round(effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])), 3), effective_rank(torch.zeros(2))
        (3.0, 0.0)
    """
    values = singular_values.detach().double()
    if not values.any():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def stable_rank(singular_values: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm (Rudelson & Vershynin, J. ACM 2007); 0 of zeros.

    It is never above the rank, and hardly moved by small values, which count much in :func:`effective_rank`.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))  # (4 + 1 + 1) / 4
        1.5
    """
    squares = singular_values.detach().double().square()
    return float(squares.sum() / squares.max()) if squares.any() else 0.0


def intruder_dimensions(before: Tensor, after: Tensor, top: int = TOP, threshold: float = THRESHOLD) -> int:
    """Count the leading left singular vectors of a trained weight that are like none of the weight it started from.

    A vector is an intruder (Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence", 2024,
    arXiv 2410.21228) when its cosine with every left singular vector from before is below the threshold, whatever its sign.
    Vectors whose singular value is below a millionth of the largest are arbitrary, and left out on both sides. Those of equal
    singular values are arbitrary within their space, so of an orthogonal matrix the count means nothing.

    Args:
        before: The weight as it was, shape ``(outputs, inputs)``.
        after: The weight as it is.
        top: How many vectors are looked at.
        threshold: The cosine.

    Example:
        >>> before, change = torch.diag(torch.tensor([3.0, 2.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 5.0]))
        >>> intruder_dimensions(before, before + change), intruder_dimensions(before, 2 * before)
        (1, 0)
    """
    before, after = _double(before), _double(after)
    if torch.equal(before, after):  # also where vectors are arbitrary
        return 0
    known, leading = left_vectors(before), left_vectors(after)[:, :top]
    if known.shape[1] == 0:
        return leading.shape[1]
    return int(((leading.T @ known).abs().amax(1) < threshold).sum())


def left_vectors(matrix: Tensor) -> Tensor:
    """Left singular vectors of all resolved singular values, largest first, as columns, in double precision on the CPU.

    Args:
        matrix: Shape ``(rows, columns)``, finite.

    Example:
        >>> left_vectors(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])).abs()
        tensor([[0.],
                [1.],
                [0.]], dtype=torch.float64)
    """
    matrix = _double(matrix)
    squares, vectors = torch.linalg.eigh(_gram(matrix))
    values, vectors = squares.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    kept = values > _RESOLVED * values.max()
    found: Tensor = vectors[:, kept]
    return found if matrix.shape[0] <= matrix.shape[1] else matrix @ found / values[kept]


def _double(matrix: Tensor) -> Tensor:
    return matrix.detach().to("cpu", torch.float64)


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix

"""How much a weight matters: the scores that pruning ranks by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_peft.weights.importance import magnitude
from lightning_peft_plugins.pruning._shared.layer_statistics import LayerStatistics, Quantity


@dataclass(frozen=True)
class Score:
    """A score.

    Attributes:
        reads: What it needs beside the weight.
        value: Number per weight, from the weight, its statistics and the dimension of its inputs.
    """

    reads: frozenset[Quantity]
    value: Callable[[Tensor, LayerStatistics, int], Tensor]


def wanda(weight: Tensor, inputs: Tensor, dim: int) -> Tensor:
    """Magnitude times the norm of the input: ``|W_ij| ||X_j||`` (Sun et al., ICLR 2024, arXiv 2306.11695, eq. 1).

    Args:
        weight: Weight of a layer.
        inputs: Squared norm of each input, shape ``(inputs,)``.
        dim: Dimension of the inputs in ``weight``.

    Example:
        >>> import torch
        >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([9.0, 4.0]), dim=1)
        tensor([[3., 4.]])
    """
    shape = [1] * weight.ndim
    shape[dim] = -1
    return weight.detach().abs() * inputs.sqrt().to(weight.dtype).view(shape)


def _gblm(weight: Tensor, seen: LayerStatistics, dim: int) -> Tensor:
    # The norm of a weight's gradients is over the steps, not their mean, while inputs are a mean over samples.
    return wanda(weight, seen.mean("x^2"), dim) + GBLM_ALPHA * weight.detach().abs() * seen.sum("g^2").sqrt()


def beta_rank(weight: Tensor, ratio: Tensor, dim: int) -> Tensor:
    """Magnitude times how much a filter spreads what it sees (Homayounfar et al., 2023, arXiv 2304.07461, official code).

    Args:
        weight: Weight of a layer.
        ratio: Deviation of each output over that of what its filter sees, shape ``(outputs,)``.
        dim: Dimension of the inputs in ``weight``.

    Example:
        >>> import torch
        >>> beta_rank(torch.tensor([[1.0, -2.0], [1.0, 1.0]]), torch.tensor([0.5, 2.0]), dim=1)
        tensor([[0.5000, 1.0000],
                [2.0000, 2.0000]])
    """
    shape = [1] * weight.ndim
    shape[1 if dim == 0 else 0] = -1
    return weight.detach().abs() * ratio.to(weight.dtype).view(shape)


GBLM_ALPHA = 100.0  # the official code multiplies gradients by 100 before it adds them with factor 1

SCORES: dict[str, Score] = {
    "magnitude": Score(frozenset(), lambda weight, seen, dim: magnitude(weight)),
    "energy": Score(frozenset(), lambda weight, seen, dim: weight.detach().square()),
    "gradient": Score(frozenset({"|g|"}), lambda weight, seen, dim: seen.mean("|g|")),
    "taylor": Score(frozenset({"|wg|"}), lambda weight, seen, dim: seen.mean("|wg|")),
    "fisher": Score(frozenset({"g^2"}), lambda weight, seen, dim: weight.detach().square() * seen.mean("g^2")),
    "wanda": Score(frozenset({"x^2"}), lambda weight, seen, dim: wanda(weight, seen.mean("x^2"), dim)),
    "beta": Score(frozenset({"sd"}), lambda weight, seen, dim: beta_rank(weight, seen.mean("sd"), dim)),
    "gblm": Score(frozenset({"x^2", "g^2"}), _gblm),
}

"""Which weights of a layer are pruned together: single weights, blocks, output channels, or the inputs of a head."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Blocks of ``rows`` outputs by ``columns`` inputs; what is left at an edge is a smaller block.

    Attributes:
        rows: Outputs per group; 0 for all.
        columns: Inputs per group; 0 for all.
        whole_kernels: Whether the positions of a convolution's kernel belong to one group.
    """

    rows: int = 1
    columns: int = 1
    whole_kernels: bool = False

    @property
    def single(self) -> bool:
        """Whether every weight is a group of its own."""
        return self.rows == self.columns == 1 and not self.whole_kernels

    def scores(self, values: Tensor, dim: int) -> Tensor:
        """Mean over each group.

        Args:
            values: One number a weight, of the weight's shape.
            dim: Dimension of the inputs, 0 or 1 (:func:`~lightning_peft.network.nm_layers.input_dim`).

        Returns:
            One number a group, shape ``(row groups, column groups, positions or 1)``.

        Example:
            >>> Grouping(rows=1, columns=2).scores(torch.tensor([[1.0, 3.0, 5.0]]), dim=1).flatten()
            tensor([2., 5.])
        """
        return self.sums(values, dim) if self.single else self.sums(values, dim) / self.sizes(values.shape, dim).to(values)

    def sizes(self, shape: torch.Size, dim: int) -> Tensor:
        """Count the weights of each group, in the shape of :meth:`scores`."""
        return self.sums(torch.ones(shape), dim).long()

    def sums(self, values: Tensor, dim: int) -> Tensor:
        """Sum over each group, in the shape of :meth:`scores`."""
        matrix = _matrix(values, dim)
        if self.single:
            return matrix
        outputs, inputs, positions = matrix.shape
        rows, columns = self.rows or outputs, self.columns or inputs
        padded = F.pad(matrix, (0, 0, 0, -inputs % columns, 0, -outputs % rows))
        sums = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns, positions).sum((1, 3))
        return sums.sum(2, keepdim=True) if self.whole_kernels else sums

    def spread(self, values: Tensor, shape: torch.Size, dim: int) -> Tensor:
        """Give every weight what its group has: a decision, or a factor.

        Args:
            values: One a group, in the shape of :meth:`scores`.
            shape: Shape of the weight.
            dim: Dimension of its inputs.

        Returns:
            One a weight, of the weight's shape.

        Example:
            >>> Grouping(rows=0, columns=2).spread(torch.tensor([[[True], [False]]]), torch.Size([1, 3]), dim=1)
            tensor([[ True,  True, False]])
        """
        moved = torch.empty(shape, device="meta").movedim(dim, 1).shape
        rows, columns = self.rows or moved[0], self.columns or moved[1]
        spread = values.repeat_interleave(rows, 0)[: moved[0]].repeat_interleave(columns, 1)[:, : moved[1]]
        return spread.expand(-1, -1, moved[2:].numel()).reshape(moved).movedim(1, dim).contiguous()


def _matrix(values: Tensor, dim: int) -> Tensor:
    """Outputs by inputs by kernel positions."""
    moved = values.movedim(dim, 1)
    return moved.flatten(2) if moved.ndim > 2 else moved.unsqueeze(2)


def parse_grouping(pattern: str) -> Grouping:
    """Read a pattern of pruning.

    Args:
        pattern: ``"unstructured"``; ``"block:RxC"``, R outputs by C inputs, whole kernels; ``"channel"``, one output;
            ``"head:SIZE"``, so many consecutive inputs of a layer that reads attention heads, with all outputs.

    Raises:
        MisconfigurationException: It is none of these.

    Example:
        >>> parse_grouping("block:4x8"), parse_grouping("head:64")
        (Grouping(rows=4, columns=8, whole_kernels=True), Grouping(rows=0, columns=64, whole_kernels=True))
    """
    if pattern == "unstructured":
        return Grouping()
    if pattern == "channel":
        return Grouping(1, 0, whole_kernels=True)
    if match := re.fullmatch(r"block:\s*([1-9]\d*)\s*x\s*([1-9]\d*)", pattern):
        return Grouping(int(match[1]), int(match[2]), whole_kernels=True)
    if match := re.fullmatch(r"head:\s*([1-9]\d*)", pattern):
        return Grouping(0, int(match[1]), whole_kernels=True)
    raise MisconfigurationException(
        f'pattern={pattern!r} is unknown. Write "unstructured", "N:M" ("2:4"), "block:RxC" ("block:4x4"), "channel" or '
        '"head:SIZE" ("head:64").'
    )

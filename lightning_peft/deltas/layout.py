"""How a weight is read as the matrix that a delta is made for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size, Tensor, nn

from lightning_peft.network.layers import has_class


@dataclass(frozen=True)
class Layout:
    """A weight as one matrix, or as a stack of them.

    Attributes:
        shape: Shape of the weight.
        transposed: Whether its first dimension counts the inputs, as in ``Conv1D`` of transformers.
        stacked: Whether its first dimension counts matrices, as in stacks of experts.

    Example:
        >>> Layout(Size([8, 4, 3, 3])).matrix_shape, Layout(Size([4, 8]), transposed=True).matrix_shape
        (torch.Size([8, 36]), torch.Size([8, 4]))
        >>> Layout(Size([5, 8, 4]), stacked=True).matrix_shape
        torch.Size([5, 8, 4])
    """

    shape: Size
    transposed: bool = False
    stacked: bool = False

    @property
    def matrix_shape(self) -> Size:
        """``(outputs, inputs)``, kernels flattened into the inputs; before it the number of matrices, if there are several."""
        if self.stacked:
            return self.shape
        first, others = self.shape[0], self.shape[1:].numel()
        return Size([others, first]) if self.transposed else Size([first, others])

    @property
    def input_shape(self) -> Size:
        """The dimensions of the inputs as the weight has them: a kernel's are apart."""
        whole = self.stacked or self.transposed
        return self.matrix_shape[-1:] if whole else self.shape[1:]

    @property
    def largest_rank(self) -> int:
        """The rank that no matrix of this shape exceeds."""
        return min(self.matrix_shape[-2:])

    def matrix(self, weight: Tensor) -> Tensor:
        """Read a weight as its matrix."""
        if self.stacked:
            return weight
        return weight.T if self.transposed else weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`matrix`."""
        if self.stacked:
            return matrix
        return matrix.T if self.transposed else matrix.reshape(self.shape)


def layout_of(layer: nn.Module, tensor: Tensor, name: str = "weight") -> Layout:
    """Return how a layer's parameter is laid out."""
    stacked = tensor.ndim == 3 and name != "weight"
    return Layout(tensor.shape, transposed=name == "weight" and has_class(layer, "Conv1D"), stacked=stacked)

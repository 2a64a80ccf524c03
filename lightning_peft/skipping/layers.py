"""Layers that compute selected output channels from selected input channels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.attach.layers import is_conv
from lightning_peft.skipping.gathering import crossed, kept, rows_of, transpose
from lightning_peft.skipping.native import Geometry, Part, kernels, usable
from lightning_peft.skipping.selection import Selection, UnitPredictor, in_layout, spread
from lightning_peft.skipping.shell import Shell


@dataclass(frozen=True)
class Way:
    """How a layer computes what is selected; every way gives the same numbers.

    Attributes:
        rows: Gather the weight's rows; otherwise all outputs are computed and the selected ones taken.
        columns: Gather the weight's columns; otherwise inputs are put back among zeros.
        product: Multiply matrices instead of calling the convolution kernel, which prepares itself anew for each new size.
        native: Let a compiled kernel read the rows and columns where they are, instead of copying them; without one, or for
            tensors it does not take, PyTorch computes as the other fields say.
    """

    rows: bool = True
    columns: bool = True
    product: bool = False
    native: bool = False

    def __str__(self) -> str:
        sides = [name for name, used in (("rows", self.rows), ("columns", self.columns)) if used]
        return f"{'+'.join(sides) or 'dense'}{' by kernel' if self.native else ' by product' if self.product else ''}"


class SelectiveLayer(nn.Module):
    """A convolution or linear layer between two selections.

    Args:
        layer: The layer, its norm folded into it; its weight is shared.
        reads: Selection its input is reduced to, if it may be.
        writes: Selection its output is reduced to, if it is.
        predictor: Chooses ``writes`` from the input.
    """

    weight: Tensor
    bias: Tensor | None
    transposed: Tensor | None
    reads: Selection | None
    writes: Selection | None
    predictor: UnitPredictor | None

    def __init__(self, layer: Any, reads: Selection | None, writes: Selection | None, predictor: UnitPredictor | None) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.convolution = is_conv(layer)
        self._shell = Shell(layer)
        self.seen = reads  # the predictor needs to know where its inputs stand, also when that never changes
        if reads is not None and reads.fixed:
            assert reads.index is not None
            self.weight, reads = kept(self.weight, 1, reads.index), None
        if writes is not None and writes.fixed:
            assert writes.index is not None
            self.weight = kept(self.weight, 0, writes.index)
            self.bias = None if self.bias is None else kept(self.bias, 0, writes.index)
            writes = predictor = None
        # Columns of a matrix are gathered as rows of its transpose, in long runs: (places of the filter, inputs, outputs).
        self._geometry = self._find_geometry()
        pointwise = reads is not None and self.convolution and self._can_multiply() and self.weight[0, 0].numel() == 1
        transposes = pointwise or (self._geometry is not None and kernels() is not None)
        self.register_buffer("transposed", transpose(self.weight) if transposes else None, False)
        self.register_load_state_dict_post_hook(_follow_weight)  # type: ignore[no-untyped-call]
        self.reads, self.writes, self.predictor = reads, writes, predictor
        self.way = Way()
        self.channels_last = False
        self.dense = False

    def ways(self) -> Iterator[Way]:
        """Yield every way there is for this layer."""
        reads, writes = self.reads is not None, self.writes is not None and not self.dense
        products = (False, True) if self._can_multiply() else (False,)
        for rows, columns, product in itertools.product((True, False)[: 1 + writes], (True, False)[: 1 + reads], products):
            yield Way(rows and writes, columns and reads, product)
        if self._geometry is not None and kernels() is not None and (self.channels_last or not self.convolution):
            yield Way(writes, reads, products[-1], native=True)

    def settle(self, way: Way) -> None:
        """Compute in one way from now on, and free what only others need."""
        self.way = way
        if not way.native and (way.rows or not way.columns or not way.product):
            self.transposed = None
        if self.channels_last and self.weight.ndim == 4 and not (way.rows or way.columns or way.product or way.native):
            self.weight = nn.Parameter(self.weight.detach().contiguous(memory_format=torch.channels_last), requires_grad=False)

    def _can_multiply(self) -> bool:
        layer = self._shell.layer
        plain = type(layer).forward is nn.Conv2d.forward and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str)

    def _find_geometry(self) -> Geometry | None:
        """Where the filter goes, of a layer the kernels can compute."""
        layer = self._shell.layer
        if self.convolution and self._can_multiply() and layer.groups == 1:
            return Geometry(tuple(self.weight.shape[2:]), layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
        return Geometry((1, 1), (1, 1), (0, 0), (1, 1)) if type(layer).forward is nn.Linear.forward else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Choose, gather and compute."""
        inputs = in_layout(inputs, self.channels_last)
        self.choose(inputs)
        return self.compute(inputs, self.way)

    def choose(self, inputs: Tensor) -> None:
        """Choose the outputs that these inputs need, where that is this layer's to choose."""
        if self.predictor is not None and self.writes is not None:
            self.predictor.choose(inputs, self.seen, self.writes, dense=self.dense)

    def compute(self, inputs: Tensor, way: Way) -> Tensor:
        """Compute the selected channels in one of :meth:`ways`, of inputs in the network's memory layout."""
        dim = 1 if self.convolution else -1
        if way.native and usable(inputs, self.weight):
            return self._by_kernel(inputs)
        weight, bias = self.weight, self.bias
        rows = None if self.writes is None else self.writes.index
        columns = None if self.reads is None else self.reads.index
        if rows is not None and way.rows:
            assert self.writes is not None
            bias = None if bias is None else rows_of(bias, self.writes)
            if columns is not None and way.columns and weight.ndim > 2 and weight.is_contiguous():
                weight, columns = crossed(weight, self.writes, columns), None
            else:
                weight = rows_of(weight, self.writes)
        if columns is not None:
            assert self.reads is not None
            if way.columns and way.product and not way.rows and self.transposed is not None and len(self.transposed) == 1:
                weight = self.transposed[0].index_select(0, columns).t()
                weight = weight.view(*weight.shape, *[1] * (self.weight.ndim - 2))
            elif way.columns:
                weight = weight.index_select(1, columns)
            else:
                inputs = spread(inputs, self.reads, dim)
        output = self._multiply(inputs, weight, bias) if way.product else self._shell(inputs, weight, bias)
        if rows is not None and not way.rows:
            assert self.writes is not None
            output = output.index_select(dim, rows)
            output.narrow(dim, self.writes.count, len(rows) - self.writes.count).zero_()
        return in_layout(output, self.channels_last)

    def _by_kernel(self, inputs: Tensor) -> Tensor:
        compiled = kernels()
        assert compiled is not None
        assert self.transposed is not None
        assert self._geometry is not None
        _, every_input, every_output = self.transposed.shape
        columns = Part(every_input, every_input) if self.reads is None else self.reads.part
        rows = Part(every_output, every_output) if self.writes is None else self.writes.part
        if self.convolution:
            return compiled.convolve(inputs, self.transposed, self.bias, self._geometry, columns, rows)
        places = inputs.contiguous().view(1, 1, -1, inputs.shape[-1]).permute(0, 3, 1, 2)
        output = compiled.convolve(places, self.transposed, self.bias, self._geometry, columns, rows)
        return output.permute(0, 2, 3, 1).view(*inputs.shape[:-1], rows.width)

    def _multiply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve in two dimensions as a product with the unfolded input."""
        layer, kernel = self._shell.layer, weight.shape[2:]
        stride, padding, dilation = layer.stride, layer.padding, layer.dilation
        assert self._geometry is not None
        places = self._geometry.places(*inputs.shape[2:])
        if kernel.numel() == 1 and not any(padding):
            inputs = inputs[:, :, :: stride[0], :: stride[1]]
            if self.channels_last:
                return nn.functional.linear(inputs.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
            columns = inputs.flatten(2)
        else:
            columns = nn.functional.unfold(inputs, tuple(kernel), dilation, padding, stride)
        matrix = weight.flatten(1) if kernel.numel() > 1 else weight[:, :, 0, 0]
        if len(columns) == 1:
            product = matrix @ columns[0] if bias is None else torch.addmm(bias[:, None], matrix, columns[0])
        else:
            product = matrix @ columns if bias is None else matrix @ columns + bias[:, None]
        return product.view(len(inputs), -1, *places)


def _follow_weight(layer: nn.Module, incompatible: Any) -> None:
    """Transpose a weight that was loaded."""
    assert isinstance(layer, SelectiveLayer)
    if layer.transposed is not None:
        layer.transposed = transpose(layer.weight)

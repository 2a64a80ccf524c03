"""Layers that compute selected output channels from selected input channels."""

from __future__ import annotations

import contextlib
import enum
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.layers import is_conv
from lightning_peft_plugins.pruning._ftwt.skipping.gathering import crossed, kept, rows_of
from lightning_peft_plugins.pruning._ftwt.skipping.native import Geometry, Part, by_input, is_by_input, kernels, usable
from lightning_peft_plugins.pruning._ftwt.skipping.selection import (
    Choice,
    Selection,
    check_channels,
    in_layout,
    memory_format,
    spread,
)
from lightning_peft_plugins.pruning._ftwt.skipping.shell import Shell
from lightning_peft_plugins.pruning._ftwt.skipping.unit_predictor import UnitPredictor
from lightning_peft_plugins.pruning._ftwt.skipping.values import readable


@dataclass(frozen=True)
class Computation:
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


class Layout(enum.Enum):
    """How a weight lies in memory."""

    PLAIN = "plain"
    CHANNELS_LAST = "channels last"
    BY_INPUT = "by input"

    def lay(self, weight: Tensor) -> Tensor:
        """The same weight, laid out so."""
        if self is Layout.BY_INPUT:
            return by_input(weight)
        return weight.contiguous(memory_format=memory_format(self is Layout.CHANNELS_LAST))

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight is laid out so."""
        if self is Layout.BY_INPUT:
            return is_by_input(weight)
        return weight.is_contiguous(memory_format=memory_format(self is Layout.CHANNELS_LAST))


class SelectiveLayer(nn.Module):
    """A convolution or linear layer between two selections.

    Its weight is one tensor, in the memory layout that suits its way, so that whatever changes the weight is computed with.

    Args:
        layer: The layer, its norm folded into it; its weight is shared.
        reads: Selection its input is reduced to, if it may be.
        writes: Selection its output is reduced to, if it is.
        predictor: Chooses ``writes`` from the input.
    """

    weight: Tensor
    bias: Tensor | None
    reads: Selection | None
    writes: Selection | None
    predictor: UnitPredictor | None

    def __init__(self, layer: Any, reads: Selection | None, writes: Selection | None, predictor: UnitPredictor | None) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.convolution = is_conv(layer)
        self._shell = Shell(layer)
        if reads is not None and reads.fixed is not None:
            self.weight, reads = kept(self.weight, 1, reads.fixed), None
        if writes is not None and writes.fixed is not None:
            self.weight = kept(self.weight, 0, writes.fixed)
            self.bias = None if self.bias is None else kept(self.bias, 0, writes.fixed)
            writes = predictor = None
        self._product = self._can_multiply()
        self._geometry = self._find_geometry()
        self._laid: dict[Layout, Tensor] | None = None
        self.register_load_state_dict_post_hook(_lay_out_again)  # type: ignore[no-untyped-call]
        self.reads, self.writes, self.predictor = reads, writes, predictor
        self.way = Computation()
        self.channels_last = False
        self.dense = False

    def ways(self) -> Iterator[Computation]:
        """Yield every way there is for this layer."""
        reads, writes = self.reads is not None, self.writes is not None and not self.dense
        products = (False, True) if self._product else (False,)
        for rows, columns, product in itertools.product((True, False)[: 1 + writes], (True, False)[: 1 + reads], products):
            yield Computation(rows and writes, columns and reads, product)
        if self._geometry is not None and kernels() is not None and (self.channels_last or not self.convolution):
            yield Computation(writes, reads, products[-1], native=True)

    @contextlib.contextmanager
    def every_layout(self) -> Iterator[None]:
        """Have the weight in each memory layout meanwhile, to try every way at its best."""
        layouts = {self._layout(way) for way in self.ways()}
        self._laid = {layout: layout.lay(self.weight.detach()) for layout in layouts}
        try:
            yield
        finally:
            self._laid = None

    @torch.no_grad()
    def settle(self, way: Computation) -> None:
        """Compute in one way from now on, and lay the weight out for it."""
        self.way = way
        layout = self._layout(way)
        if not layout.holds(self.weight):
            self.weight = nn.Parameter(layout.lay(self.weight.detach()), self.weight.requires_grad)

    def _layout(self, way: Computation) -> Layout:
        """The memory layout of the weight in which a way is fastest."""
        columns_of_matrix = way.columns and way.product and not way.rows and self.weight[0, 0].numel() == 1
        if way.native or columns_of_matrix:
            return Layout.BY_INPUT
        whole = not (way.rows or way.columns or way.product)
        return Layout.CHANNELS_LAST if whole and self.channels_last and self.weight.ndim == 4 else Layout.PLAIN

    def _can_multiply(self) -> bool:
        layer = self._shell.layer
        plain = type(layer).forward is nn.Conv2d.forward and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str)

    def _find_geometry(self) -> Geometry | None:
        """Where the filter goes, of a layer the kernels can compute."""
        layer = self._shell.layer
        if self.convolution and self._product and layer.groups == 1:
            return Geometry(tuple(self.weight.shape[2:]), layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
        return Geometry((1, 1), (1, 1), (0, 0), (1, 1)) if type(layer).forward is nn.Linear.forward else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Choose, gather and compute."""
        self._check(inputs)
        inputs = in_layout(inputs, self.channels_last)
        self.choose(inputs)
        return self.compute(inputs, self.way)

    def _check(self, inputs: Tensor) -> None:
        if self.convolution:
            expected = self.weight.shape[1] if self.reads is None else self.reads.now.width
            check_channels(inputs, 1, expected, self.weight.ndim)
        elif self.reads is not None:
            check_channels(inputs, -1, self.reads.now.width)

    def choose(self, inputs: Tensor) -> None:
        """Choose the outputs that these inputs need, where that is this layer's to choose."""
        if self.predictor is not None and self.writes is not None:
            self.predictor.choose(inputs, self.reads, self.writes, dense=self.dense)

    def compute(self, inputs: Tensor, way: Computation) -> Tensor:
        """Compute the selected channels in one of :meth:`ways`, of inputs in the network's memory layout."""
        weight = self.weight if self._laid is None else self._laid[self._layout(way)]
        reads, writes = (None if each is None else each.now for each in (self.reads, self.writes))
        if way.native and self._takes(inputs, weight):
            return self._by_kernel(inputs, weight, reads, writes)
        dim = 1 if self.convolution else -1
        rows = None if writes is None else writes.index
        bias = self.bias if rows is None or not way.rows else self._bias_of(writes)
        weight, inputs = self._gathered(weight, inputs, way, reads, writes)
        product = way.product and inputs.dtype is weight.dtype and readable(inputs) and not _is_autocast(inputs)
        output = self._multiply(inputs, weight, bias) if product else self._shell(inputs, weight, bias)
        if rows is not None and not way.rows:
            assert writes is not None
            output = output.index_select(dim, rows)
            output.narrow(dim, writes.count, len(rows) - writes.count).zero_()
        return in_layout(output, self.channels_last)

    def _bias_of(self, writes: Choice | None) -> Tensor | None:
        assert writes is not None
        return None if self.bias is None else rows_of(self.bias, writes)

    def _gathered(
        self, weight: Tensor, inputs: Tensor, way: Computation, reads: Choice | None, writes: Choice | None
    ) -> tuple[Tensor, Tensor]:
        """The rows and columns of the weight that a way takes, and the inputs they are for."""
        columns = None if reads is None else reads.index
        if writes is not None and writes.index is not None and way.rows:
            if columns is not None and way.columns and weight.ndim > 2 and weight.is_contiguous():
                return crossed(weight, writes, columns), inputs
            weight = rows_of(weight, writes)
        if columns is None:
            return weight, inputs
        if not way.columns:
            assert reads is not None
            return weight, spread(inputs, reads, 1 if self.convolution else -1)
        if is_by_input(weight) and weight[0, 0].numel() == 1:  # rows of its transpose are read in long runs
            taken = weight.flatten(1).t().index_select(0, columns).t()
            return taken.view(*taken.shape, *[1] * (weight.ndim - 2)), inputs
        return weight.index_select(1, columns), inputs

    def _takes(self, inputs: Tensor, weight: Tensor) -> bool:
        """Whether a kernel can compute from these inputs."""
        if not (usable(inputs, weight, self.bias) and is_by_input(weight)):  # first, since vmap cannot tell a layout
            return False
        return not self.convolution or inputs.is_contiguous(memory_format=torch.channels_last)

    def _by_kernel(self, inputs: Tensor, weight: Tensor, reads: Choice | None, writes: Choice | None) -> Tensor:
        compiled = kernels()
        assert compiled is not None
        assert self._geometry is not None
        every_output, every_input = weight.shape[:2]
        columns = Part(every_input, every_input) if reads is None else reads.part
        rows = Part(every_output, every_output) if writes is None else writes.part
        bias = None if self.bias is None else self.bias.contiguous()
        if self.convolution:
            return compiled.convolve(inputs, weight, bias, self._geometry, columns, rows)
        places = inputs.contiguous().view(1, 1, -1, inputs.shape[-1]).permute(0, 3, 1, 2)
        output = compiled.convolve(places, weight, bias, self._geometry, columns, rows)
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
        return product.view(len(inputs), len(weight), *places)


def _is_autocast(inputs: Tensor) -> bool:
    return torch.is_autocast_enabled(inputs.device.type)


def _lay_out_again(layer: nn.Module, incompatible: Any) -> None:
    """A weight that was not copied but taken over as it is may lie otherwise in memory."""
    assert isinstance(layer, SelectiveLayer)
    layer.settle(layer.way)

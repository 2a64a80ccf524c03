"""Parts of a weight: chosen rows and columns, copied together."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft.skipping.selection import Selection


def kept(value: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    """A part of a weight for good."""
    return nn.Parameter(value.detach().index_select(dim, index), requires_grad=False)


def crossed(weight: Tensor, selection: Selection, columns: Tensor) -> Tensor:
    """Selected rows and columns of a convolution's weight at once: filters that are not needed are never read."""
    assert selection.index is not None
    inputs, kernel = weight.shape[1], weight.shape[2:]
    places = (selection.index[:, None] * inputs + columns).flatten()
    found = weight.view(-1, *kernel).index_select(0, places).view(len(selection.index), len(columns), *kernel)
    found[selection.count :] = 0
    return found


def rows_of(value: Tensor, selection: Selection) -> Tensor:
    """Rows of the selected channels; those that only round the number up are zero."""
    assert selection.index is not None
    rows = value.index_select(0, selection.index)
    if selection.count < len(selection.index):
        rows[selection.count :] = 0
    return rows


def transpose(weight: Tensor) -> Tensor:
    """A weight as the kernels and gathered columns read it, shape ``(places of the filter, inputs, outputs)``."""
    return weight.detach().reshape(*weight.shape[:2], -1).permute(2, 1, 0).contiguous()

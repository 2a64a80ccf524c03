"""Parts of a weight: chosen rows and columns, copied together."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft_plugins.pruning._ftwt.skipping.selection import Choice


def kept(value: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    """A part of a weight for good."""
    return nn.Parameter(value.detach().index_select(dim, index), requires_grad=False)


def crossed(weight: Tensor, choice: Choice, columns: Tensor) -> Tensor:
    """Selected rows and columns of a convolution's weight at once: filters that are not needed are never read."""
    assert choice.index is not None
    inputs, kernel = weight.shape[1], weight.shape[2:]
    places = (choice.index[:, None] * inputs + columns).flatten()
    found = weight.view(-1, *kernel).index_select(0, places).view(len(choice.index), len(columns), *kernel)
    found[choice.count :] = 0
    return found


def rows_of(value: Tensor, choice: Choice) -> Tensor:
    """Rows of the selected channels; those that only round the number up are zero."""
    assert choice.index is not None
    rows = value.index_select(0, choice.index)
    if choice.count < len(choice.index):
        rows[choice.count :] = 0
    return rows

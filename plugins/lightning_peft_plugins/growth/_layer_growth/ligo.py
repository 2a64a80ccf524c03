"""LiGO: a linear growth operator whose matrices can be learnt (Wang et al., "Learning to Grow Pretrained Models", ICLR 2023).

arXiv 2303.00980. A new weight is ``sum_i w[l, i] B_out W_i B_in^T`` over the old layers ``i``: one matrix ``B`` for each axis,
shared by all that reads or writes it (the official code has one each for queries, keys and values, here they share one), and
one row of depth coefficients for each new layer and kind of tensor. In the official parametrisation old units stay, ``B = [I;
extra]``. No target preserves the function: LiGO's grown network is the start of a short training of the matrices, which is in
``ligo_training``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.structure.axes import Axes, size
from lightning_peft_plugins.growth._layer_growth.net2net import Edit
from lightning_peft_plugins.growth._layer_growth.used_values import Values, on_used_values


def width_matrix(extra: Tensor) -> Tensor:
    """``[I; extra]``: old units stay, new ones mix them.

    Args:
        extra: Shape ``(new - old, old)``.

    Returns:
        Shape ``(new, old)``.

    Example:
        >>> width_matrix(torch.tensor([[0.5, 0.5]]))
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000],
                [0.5000, 0.5000]])
    """
    return torch.cat((torch.eye(extra.shape[1], dtype=extra.dtype, device=extra.device), extra))


def init_extra(old: int, new: int, generator: torch.Generator, kind: Literal["rand", "sel"] = "rand") -> Tensor:
    """First value of the learnt rows: uniform and summing to 1 (``rand``), or one-hot (``sel``).

    Returns:
        Shape ``(new - old, old)``.

    Example:
        >>> init_extra(2, 5, torch.Generator().manual_seed(0), "sel").sum(1)
        tensor([1., 1., 1.])
    """
    if kind == "sel":
        return torch.nn.functional.one_hot(torch.randint(old, (new - old,), generator=generator), old).float()
    rows = torch.rand(new - old, old, generator=generator)
    return rows / rows.sum(1, keepdim=True)


def init_width(edit: Edit, generator: torch.Generator, kind: Literal["rand", "sel"] = "rand") -> dict[str, Tensor]:
    """Extra rows for every product of axes that grows, for instance ``{"width": ..., "heads head_dim": ...}``.

    A leading number, as in ``"3 heads head_dim"``, counts sections that share one matrix.
    """
    dims = {_sections(dim)[1] for entry in edit["tensors"].values() for dim in entry["dims"]}
    sizes = {dim: (size(dim, edit["axes"], 0), size(dim, edit["axes"])) for dim in sorted(dims) if dim}
    return {dim: init_extra(old, new, generator, kind) for dim, (old, new) in sizes.items() if old != new}


@on_used_values
def ligo_expand(values: Values, edit: Edit, width: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Widen; differentiable in ``width``.

    Args:
        values: Old values by qualified name.
        edit: A width edit.
        width: Extra rows by product of axes, from :func:`init_width`.

    Returns:
        New values of the edit's tensors.
    """
    return {name: _widen(values[name], entry, edit["axes"], width) for name, entry in edit["tensors"].items()}


def ligo(values: Values, edit: Edit, generator: torch.Generator, *, kind: Literal["rand", "sel"] = "rand") -> dict[str, Tensor]:
    """Widen by freshly drawn matrices.

    Args:
        values: Old values by qualified name.
        edit: A width edit.
        generator: On the CPU.
        kind: How new units mix old ones.

    Returns:
        New values of the edit's tensors.
    """
    return ligo_expand(values, edit, init_width(edit, generator, kind))


def _widen(value: Tensor, entry: Edit, axes: Axes, width: Mapping[str, Tensor]) -> Tensor:
    for position, dim in enumerate(entry["dims"]):
        sections, rest = _sections(dim)
        if entry["from"][position] == entry["to"][position]:
            continue
        matrix = width_matrix(width[rest].to(value))
        split = value.movedim(position, 0).unflatten(0, (sections, matrix.shape[1]))
        value = torch.einsum("no,so...->sn...", matrix, split).flatten(0, 1).movedim(0, position)
    return value


def _sections(dim: str) -> tuple[int, str]:
    """Split ``"3 heads head_dim"`` into 3 and the rest."""
    first, _, rest = dim.partition(" ")
    return (int(first), rest) if first.isdigit() else (1, dim)

"""LEMON: lossless growth to any width, whose copies are not alike (Wang et al., "LEMON: Lossless Model Expansion", ICLR 2024).

Arithmetic and names are those of the paper (arXiv 2310.07999) and its first author's code. Width ``d_T = k d_S + r``. The
stream repeats itself ``k`` times and fills ``r`` residual coordinates with its mean (``average`` expansion), so a layer
normalisation with ``weight * sqrt(s)`` and ``eps * s``, ``s = k d_S / d_T``, returns ``k`` copies and ``r`` zeros. Columns of
the layers behind it that face zeros are free, those that face copies need only sum to the old column, so that they can differ,
and with them the gradients of the copies.

In networks with RMS normalisation the mean plays no part, and the stream is filled with zeros (derived here, with the same
``s``, not taken from the official code). Heads and hidden units are repeated circularly, to any number.

Exact for pre-LN and RMSNorm networks at any width. Post-LN networks (BERT) add the norm's output to the stream, where its
zeros are no average: exact when the width is multiplied by a whole number, approximate else. Layers that read the stream must
do so behind a norm.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.structure.axes import Axes, index_map
from lightning_peft_plugins.growth._layer_growth.net2net import Edit, normal_like
from lightning_peft_plugins.growth._layer_growth.used_values import Values, on_used_values


def variance_ratio(old: int, new: int) -> float:
    """The factor ``s`` by which the expansion changes the variance of the stream.

    Example:
        >>> variance_ratio(6, 15)
        0.8
    """
    return new // old * old / new


def expand_stream(value: Tensor, dim: int, new: int, *, zero: bool = False, gain: Tensor | None = None) -> Tensor:
    """Repeat as often as it fits; the rest is the mean, or zero.

    Args:
        value: Any shape.
        dim: Dimension that is written to the stream.
        new: Its new size.
        zero: Whether to fill with zeros.
        gain: LayerScale on what is written, shape ``(old,)``: the mean is then that of the scaled values, divided by the factor
            that :func:`expand_gain` gives the new coordinates.

    Example:
        >>> expand_stream(torch.tensor([1.0, 3.0]), 0, 5)
        tensor([1., 3., 1., 3., 2.])
    """
    copies, rest = divmod(new, value.shape[dim])
    mean = value.mean(dim, keepdim=True)
    if gain is not None and bool(gain.any()):
        shaped = gain.to(value).view([-1 if position == dim else 1 for position in range(value.ndim)])
        mean = (value * shaped).mean(dim, keepdim=True) / gain.to(value).abs().mean()
    filling = (torch.zeros_like(mean) if zero else mean).expand([rest if p == dim else -1 for p in range(value.ndim)])
    return torch.cat((*([value] * copies), filling), dim)


def expand_gain(gain: Tensor, new: int) -> Tensor:
    """Repeat LayerScale factors; the rest is their mean magnitude.

    Example:
        >>> expand_gain(torch.tensor([1.0, -3.0]), 3)
        tensor([ 1., -3.,  2.])
    """
    copies, rest = divmod(new, len(gain))
    return torch.cat((*([gain] * copies), gain.abs().mean().expand(rest)))


def stream_index(old: int, new: int) -> Tensor:
    """Old coordinate that each coordinate behind a norm repeats; -1 where it is zero.

    Example:
        >>> stream_index(2, 5)
        tensor([ 0,  1,  0,  1, -1])
    """
    index = torch.arange(new) % old
    return torch.where(torch.arange(new) < new // old * old, index, -1)


def project_columns(weight: Tensor, dim: int, index: Tensor, free: Tensor) -> Tensor:
    """Project free columns onto those that compute what the old ones did (``projection``).

    Args:
        weight: Old weight.
        dim: Its input dimension.
        index: Old coordinate that every new input repeats, -1 for an input that is zero; shape ``(new,)``.
        free: Wished-for weight, of the new shape.

    Returns:
        The weight nearest to ``free`` whose columns sum to the old column over the copies of each coordinate.

    Example:
        >>> project_columns(torch.tensor([[3.0]]), 1, torch.tensor([0, 0, -1]), torch.tensor([[1.0, 4.0, 7.0]]))
        tensor([[0., 3., 7.]])
    """
    places, sources, excess = _excess(weight, dim, index, free)
    counts = sources.bincount(minlength=weight.shape[dim]).to(weight)
    share = excess / counts.view([-1 if position == dim else 1 for position in range(weight.ndim)])
    return free.index_add(dim, places, share.index_select(dim, sources), alpha=-1)


def complement_columns(weight: Tensor, dim: int, index: Tensor, free: Tensor) -> Tensor:
    """Let the last copy of each coordinate make up for what the free columns of the others compute (``comp``).

    Arguments and result are those of :func:`project_columns`.

    Example:
        >>> complement_columns(torch.tensor([[3.0]]), 1, torch.tensor([0, 0, -1]), torch.tensor([[1.0, 4.0, 7.0]]))
        tensor([[1., 2., 7.]])
    """
    places, sources, excess = _excess(weight, dim, index, free)
    last = places.new_zeros(weight.shape[dim]).scatter_reduce_(0, sources, places, "amax")
    return free.index_add(dim, last, excess, alpha=-1)


def _excess(weight: Tensor, dim: int, index: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns that face copies, the coordinate each repeats, and what their sums have too much."""
    places = (index >= 0).nonzero().flatten()
    places, sources = places.to(weight.device), index[places].to(weight.device)
    return places, sources, torch.zeros_like(weight).index_add_(dim, sources, free.index_select(dim, places)) - weight


def with_eps(edit: Edit) -> dict[str, Any]:
    """Return the edit LEMON needs: norms on the stream get ``eps * s``, as attribute and in the configuration.

    To be applied in the place of ``edit``, so that a replay sets them too. Norms of queries and keys share the number in the
    configuration with them and get it too: what they normalise is multiplied by ``sqrt(s)``, which leaves their result.
    """
    edit = copy.deepcopy(dict(edit))
    scale = variance_ratio(*edit["axes"]["width"]) if "width" in edit["axes"] else 1.0
    for path, norm in edit["norms"].items():
        if scale != 1.0 and (norm["dim"] == "width" or "of" in norm) and "eps" in norm:
            for name in norm.get("of", ()):
                if name in edit["tensors"]:
                    edit["tensors"][name]["factor"] = math.sqrt(scale)
            attribute, eps = norm["eps"]
            edit["attributes"].setdefault(path, {})[attribute] = [eps, eps * scale]
            if edit["eps_config"] and edit["config"]:
                edit["config"][edit["eps_config"]] = [eps, eps * scale]
    return edit


@on_used_values
def lemon(
    values: Values,
    edit: Edit,
    generator: torch.Generator,
    *,
    columns: Literal["projection", "comp"] = "projection",
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Widen without loss and without symmetry.

    Args:
        values: Old values by qualified name.
        edit: A width edit, from :func:`with_eps`.
        generator: On the CPU.
        columns: ``"projection"`` (the paper's choice for ViT) or ``"comp"`` (for BERT, with ``scale=0.1``).
        scale: Standard deviation of the free columns, in units of the old weight's (the paper takes the larger network's own
            initialisation).

    Returns:
        New values of the edit's tensors.
    """
    zero = any(norm["kind"] == "rms" and norm["dim"] == "width" for norm in edit["norms"].values())
    gains = {
        other: values[name].cpu()
        for name, entry in edit["tensors"].items()
        if entry["role"] == "scale"
        for other in entry["of"]
    }
    solve = project_columns if columns == "projection" else complement_columns
    new = {}
    for name, entry in edit["tensors"].items():
        # On the CPU: sums over copies must not differ between ranks by the order of a GPU's additions.
        value = values[name].to("cpu", torch.promote_types(values[name].dtype, torch.float32))
        std = value.std(correction=0)
        if entry["role"].startswith("norm_") and entry["dims"][0] == "width":
            value = _expand_norm(value, entry, edit["axes"])
        elif entry["role"] == "scale" and entry["dims"][0] == "width":
            value = expand_gain(value, entry["to"][0])
        else:
            value = _expand_outputs(value, entry, edit["axes"], zero, gains.get(name))
            index = _input_index(entry, edit["axes"])
            if index is not None:
                free = _free(value, entry, generator) * scale * std
                value = solve(value, entry["input"], index, free)
        new[name] = value.to(values[name])
    return new


def _expand_norm(value: Tensor, entry: Edit, axes: Axes) -> Tensor:
    """``[sqrt(s) weight] x k`` with free residual entries, ``[bias] x k`` with zeros; over ``k`` before a tied head."""
    old, new = axes["width"]
    copies, rest = divmod(new, old)
    if entry["role"] == "norm_bias":
        expanded = expand_stream(value, 0, new, zero=True)
    else:
        expanded = torch.cat((*([value] * copies), value[:rest])) * math.sqrt(variance_ratio(old, new))
    return expanded / copies if entry.get("tied_head") else expanded


def _expand_outputs(value: Tensor, entry: Edit, axes: Axes, zero: bool, gain: Tensor | None) -> Tensor:
    for position, dim in enumerate(entry["dims"]):
        if position == entry["input"] or entry["from"][position] == entry["to"][position]:
            continue
        if dim == "width":
            value = expand_stream(value, position, entry["to"][position], zero=zero, gain=gain)
        else:
            value = value.index_select(position, index_map(dim, axes).to(value.device))
    return value


def _input_index(entry: Edit, axes: Axes) -> Tensor | None:
    place = entry["input"]
    if place is None or entry["from"][place] == entry["to"][place]:
        return None
    dim = entry["dims"][place]
    return stream_index(*axes["width"]) if dim == "width" else index_map(dim, axes)


def _free(value: Tensor, entry: Edit, generator: torch.Generator) -> Tensor:
    return normal_like(value.new_empty(entry["to"]), generator)

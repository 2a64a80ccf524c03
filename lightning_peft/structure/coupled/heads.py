"""Attention heads as groups of units: which rows and columns of which layers a head is.

Names only propose here: whoever acts on a head proves it first (:mod:`lightning_peft.structure.coupled.drawn_network`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.network.layers import is_linear, is_norm, own_parameters
from lightning_peft.structure.coupled.units import Coupled, UnitCount, UnitPlace

_FUSED = (("qkv", "proj"), ("c_attn", "c_proj"))
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
_WRITERS = ("o_proj", "out_proj", "out_lin", "o")
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads")
_SPANS = ("attn_dim", "all_head_size", "split_size", "inner_dim")
_SHARES = ("num_key_value_groups",)

_Layers: TypeAlias = "list[tuple[str, Any, Tensor]]"  # linear layers, each with the unit of each of its outputs or inputs


def attention_heads(network: nn.Module) -> Iterator[Coupled]:
    """Yield the heads of every attention of a known layout.

    Known are one layer for queries, keys and values (timm's ``qkv`` with ``proj``, GPT-2's ``c_attn`` with ``c_proj``), and
    one for each (``q_proj``, ``query``, ``q_lin`` or ``q``, with ``o_proj``, ``out_proj``, ``out_lin``, ``o`` or the sibling
    ``output.dense``), low-rank pairs beside them included. With grouped queries a unit is a key-value head with all of its
    query heads; where all queries share one key-value head it is a query head.
    """
    for path, layer in network.named_modules():
        found = next(filter(None, (_fused(path, layer, names) for names in _FUSED)), None) or _separate(path, layer, network)
        if found is not None and found.units > 1:
            yield found


def whole_heads(network: nn.Module) -> dict[str, str]:
    """Why attentions keep all of their heads, by name: those whose class cannot be built with fewer."""
    kinds = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.MultiheadAttention)}
    return {
        name: f"the {layer.num_heads} heads of {layer.head_dim} of an nn.MultiheadAttention must make up the {layer.embed_dim} "
        "numbers it reads and returns, so no head can leave alone"
        for name, layer in kinds.items()
    }


def _fused(path: str, layer: nn.Module, names: tuple[str, str]) -> Coupled | None:
    heads = getattr(layer, "num_heads", None)
    parts = [getattr(layer, name, None) for name in names]
    if type(heads) is not int or not all(isinstance(part, nn.Module) and _width(part, 0) for part in parts):
        return None
    width = _width(parts[1], 1)
    whole = own_parameters(getattr(layer, "norm", None) or nn.Identity())  # a norm over all heads ties them
    if whole or width % heads or _width(parts[0], 0) != 3 * width:
        return None
    one = torch.arange(heads).repeat_interleave(width // heads)
    readers = _linear(f"{path}.{names[0]}", parts[0], 0, one.repeat(3))
    gate = getattr(layer, "gate", None)
    if isinstance(gate, nn.Linear):
        readers.append((f"{path}.gate", gate, one))
    return _group(path, layer, heads, readers, _linear(f"{path}.{names[1]}", parts[1], 1, one))


def _separate(path: str, layer: nn.Module, network: nn.Module) -> Coupled | None:
    size = next((vars(layer)[key] for key in _SIZES if type(vars(layer).get(key)) is int), 0)
    names = next((names for names in _SEPARATE if all(_width(getattr(layer, n, None), 0) for n in names)), None)
    outside = f"{path.rpartition('.')[0]}.output.dense".removeprefix(".")
    writers = {f"{path}.{name}".removeprefix("."): getattr(layer, name, None) for name in _WRITERS}
    if names is not None and names[0] == "query":
        writers[outside] = dict(network.named_modules()).get(outside)
    writer = next((name for name, part in writers.items() if _width(part, 1)), None)
    if names is None or not size or writer is None:
        return None
    parts = [getattr(layer, name) for name in names]
    queries, keys, values = (_width(part, 0) for part in parts)
    if keys % size or keys != values or not keys or queries % keys or _width(writers[writer], 1) != queries:
        return None
    shared = keys == size < queries  # one key-value head for all queries
    heads = (queries if shared else keys) // size
    one = torch.arange(heads).repeat_interleave(queries // heads)
    readers = _linear(f"{path}.{names[0]}", parts[0], 0, one)
    for name, part in () if shared else zip(names[1:], parts[1:], strict=True):
        readers += _linear(f"{path}.{name}", part, 0, torch.arange(heads).repeat_interleave(size))
    counts = (*_COUNTS, *_SHARES) if shared else _COUNTS
    return _group(path, layer, heads, readers, _linear(writer, writers[writer], 1, one), counts)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    weight: Any = layer.weight
    return tuple(weight.shape) if isinstance(layer, nn.Linear) else tuple(weight.shape[::-1])


def _width(part: Any, side: int) -> int:
    """Outputs (0) or inputs (1) of a linear layer, or of the one that an adapter holds; 0 for anything else."""
    part = getattr(part, "base_layer", part)
    return _sizes(part)[side] if isinstance(part, nn.Module) and is_linear(part) else 0


def _linear(path: str, part: Any, side: int, units: Tensor) -> _Layers:
    """The linear layers in a part that have all of its outputs (0) or inputs (1)."""
    return [
        (f"{path}.{name}".rstrip("."), layer, units)
        for name, layer in part.named_modules()
        if is_linear(layer) and _sizes(layer)[side] == len(units)
    ]


def _group(
    path: str, layer: nn.Module, heads: int, readers: _Layers, writers: _Layers, counts: Sequence[str] = _COUNTS
) -> Coupled:
    places, numbers = [], []
    for name, part, units in readers:
        plain = isinstance(part, nn.Linear)
        places.append(UnitPlace(f"{name}.weight", 0 if plain else 1, units, scored=True, written=True))
        if part.bias is not None:
            places.append(UnitPlace(f"{name}.bias", 0, units, written=True))
        numbers.append(UnitCount(name, "out_features" if plain else "nf", units))
    for name, part, units in writers:
        plain = isinstance(part, nn.Linear)
        places.append(UnitPlace(f"{name}.weight", 1 if plain else 0, units, scored=True))
        numbers.append(UnitCount(name, "in_features" if plain else "nx", units))
    one = writers[0][2]
    for attribute, value in vars(layer).items():
        if attribute in _SPANS and value == len(one):
            numbers.append(UnitCount(path, attribute, one))
        elif attribute in counts and type(value) is int and value and value % heads == 0:
            numbers.append(UnitCount(path, attribute, torch.arange(heads).repeat_interleave(value // heads)))
    for name, dim in _tables(layer, heads):
        table = f"{path}.{name}".removeprefix(".")
        places.append(UnitPlace(table, dim, torch.arange(heads)))
        if isinstance(layer.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            numbers.append(UnitCount(table.rpartition(".")[0], "embedding_dim", torch.arange(heads)))
    return Coupled(path, "heads", heads, places, numbers)


def _tables(layer: nn.Module, heads: int) -> Iterator[tuple[str, int]]:
    """Parameters with a number for each head, such as tables of relative positions, and the dimension of the heads."""
    for path, part in layer.named_modules():
        if is_linear(part) or is_norm(part):
            continue
        own: Mapping[str, Tensor] = own_parameters(part)
        for name, parameter in own.items():
            dims = [dim for dim, length in enumerate(parameter.shape) if length == heads]
            if len(dims) == 1:
                yield f"{path}.{name}".removeprefix("."), dims[0]

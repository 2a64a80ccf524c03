"""Attention heads as groups of units: which rows and columns of which layers a head is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.layers import own_parameters
from lightning_peft_plugins.pruning._structured_pruning.coupled import Coupled, UnitCount, UnitPlace

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")
_SPANS = ("attn_dim", "all_head_size")


def attention_heads(network: nn.Module) -> Iterator[Coupled]:
    """Yield the heads of every attention of a known layout.

    Known are timm's ``Attention`` (one layer ``qkv`` with ``proj``), Hugging Face's Llama family (``q_proj``, ``k_proj``,
    ``v_proj``, ``o_proj``) and BERT family (``query``, ``key``, ``value`` with the sibling ``output.dense``). With grouped
    queries a unit is a key-value head with all of its query heads.
    """
    modules = dict(network.named_modules())
    for path, layer in modules.items():
        if own_parameters(layer):
            continue  # a table of relative positions, say, which has heads of its own
        found = _fused(path, layer) or _separate(path, layer, modules)
        if found is not None and found.units > 1:
            yield found


def _fused(path: str, layer: nn.Module) -> Coupled | None:
    heads, reader, writer = (getattr(layer, name, None) for name in ("num_heads", "qkv", "proj"))
    if type(heads) is not int or not isinstance(reader, nn.Linear) or not isinstance(writer, nn.Linear):
        return None
    whole = own_parameters(getattr(layer, "norm", None) or nn.Identity())  # a norm over all heads ties them
    if whole or writer.in_features % heads or reader.out_features != 3 * writer.in_features:
        return None
    size = writer.in_features // heads
    one = torch.arange(heads).repeat_interleave(size)
    readers = [(f"{path}.qkv", reader, one.repeat(3))]
    gate = getattr(layer, "gate", None)
    if isinstance(gate, nn.Linear):
        readers.append((f"{path}.gate", gate, one))
    return _group(path, layer, heads, readers, (f"{path}.proj", writer, one))


def _separate(path: str, layer: nn.Module, modules: dict[str, nn.Module]) -> Coupled | None:
    names = next((names for names in _SEPARATE if all(isinstance(getattr(layer, n, None), nn.Linear) for n in names)), None)
    size = next((vars(layer)[key] for key in ("head_dim", "attention_head_size") if type(vars(layer).get(key)) is int), 0)
    if names is None or not size:
        return None
    query, key, value = (modules[f"{path}.{name}"] for name in names)
    outside = f"{path.rpartition('.')[0]}.output.dense".removeprefix(".")
    writer_path = outside if names[0] == "query" else f"{path}.o_proj"
    writer = modules.get(writer_path)
    if not all(isinstance(part, nn.Linear) for part in (query, key, value, writer)):
        return None
    heads = int(key.out_features) // size  # type: ignore[arg-type]
    widths = [int(part.out_features) for part in (query, key, value)]  # type: ignore[arg-type]
    if not heads or widths[1] != heads * size or widths[2] != widths[1] or widths[0] % widths[1]:
        return None
    if writer.in_features != widths[0]:  # type: ignore[union-attr]
        return None
    kv = torch.arange(heads).repeat_interleave(size)
    queries = torch.arange(heads).repeat_interleave(size * (widths[0] // widths[1]))
    readers = list(zip([f"{path}.{name}" for name in names], (query, key, value), (queries, kv, kv), strict=True))
    return _group(path, layer, heads, readers, (writer_path, writer, queries))


def _group(
    path: str,
    layer: nn.Module,
    heads: int,
    readers: Sequence[tuple[str, Any, Tensor]],
    writer: tuple[str, Any, Tensor],
) -> Coupled:
    places, numbers = [], []
    for name, reader, units in readers:
        places.append(UnitPlace(f"{name}.weight", 0, units, scored=True, written=True))
        if reader.bias is not None:
            places.append(UnitPlace(f"{name}.bias", 0, units))
        numbers.append(UnitCount(name, "out_features", units))
    places.append(UnitPlace(f"{writer[0]}.weight", 1, writer[2], scored=True))
    numbers.append(UnitCount(writer[0], "in_features", writer[2]))
    for attribute, value in vars(layer).items():
        if attribute in _SPANS and value == len(writer[2]):
            numbers.append(UnitCount(path, attribute, writer[2]))
        elif attribute in _COUNTS and type(value) is int and value % heads == 0:
            numbers.append(UnitCount(path, attribute, torch.arange(heads).repeat_interleave(value // heads)))
    return Coupled(path, "heads", heads, places, numbers)

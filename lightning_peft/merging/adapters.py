"""Adapters in folders of PEFT, as the whole models that they are on a base: a weight is computed when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.deltas import peft_files, peft_modules
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.peft_folder import warn_of_unknown
from lightning_peft.deltas.peft_format import Saved, Target
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model


def opened(folder: Path, base: Model | None) -> Model:
    """Open an adapter.

    Args:
        folder: Its folder.
        base: The model that it was trained beside: the network, or a module that has it as a part.

    Raises:
        MergeError: There is no base, or it has no such layers.
        MisconfigurationException: The folder is damaged, pickled, or of a type that nothing here reads.
    """
    if base is None:
        raise MergeError(
            f"{folder} is an adapter, a difference to the model that it was trained beside. Give that with base= (on the "
            "command line: --base)."
        )
    kind, saved = peft_files.read(folder)
    warn_of_unknown(kind, saved)
    prefix = _prefix(saved, base)
    own = {name.removeprefix(prefix): tensor for name, tensor in base.tensors.items() if name.startswith(prefix)}
    trained = {prefix + name: value for name, value in peft_modules.loaded_by_name(own, saved, base.label).items()}
    tensors = {name: trained.get(name, tensor) for name, tensor in base.tensors.items()}
    targets = [_target(layer, tensors[f"{prefix}{layer}.weight"], saved) for layer in saved.layers]
    computed = dict(base.computed)
    for target, form in zip(targets, kind.forms(targets, saved), strict=True):
        name = f"{prefix}{target.name}.weight"
        if form is not None:
            computed[name] = partial(_with, form, base if name not in trained else tensors, name)
    return replace(base, label=str(folder), tensors=tensors, computed=computed)


def _with(form: Form, base: Model | Mapping[str, Tensor], name: str) -> Tensor:
    """The weight with its delta, in single precision or better."""
    weight = base.value(name) if isinstance(base, Model) else base[name]
    return form.on_weight(weight.cpu().to(torch.promote_types(weight.dtype, torch.float32)))


def _prefix(saved: Saved, base: Model) -> str:
    """Find what the names of the network that PEFT wrapped begin with in the base."""
    names = [f"{layer}.weight" for layer in saved.layers]
    whole = [name.removesuffix(names[0]) for name in base.tensors if f".{name}".endswith(f".{names[0]}")]
    found = [prefix for prefix in whole if all(prefix + name in base.tensors for name in names)]
    if len(found) == 1 or "" in found:
        return "" if "" in found else found[0]
    if found:
        raise MergeError(
            f"{saved.path} fits two networks of {base.label}: {found[0]!r} and {found[1]!r}. Give the one that it was trained "
            "beside as the base, saved alone."
        )
    lacking = next((name for name in names if not any(f".{each}".endswith(f".{name}") for each in base.tensors)), names[0])
    raise MergeError(
        f"{saved.path} has an adapter of {lacking}, which {base.label} does not have beside the others. It was trained beside "
        "another model: give that as the base."
    )


def _target(layer: str, weight: Tensor, saved: Saved) -> Target:
    """Build what formats ask of a layer; its kind is read off the adapter."""
    tensors = saved.layers[layer]
    table = any("embedding" in key for key in tensors)
    made = (nn.Embedding if table else nn.Linear)(1, 1, device="meta")
    made._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
    return Target(layer, made, Layout(weight.shape, transposed=not table and _transposed(weight, tensors, saved)))


def _transposed(weight: Tensor, tensors: Mapping[str, Tensor], saved: Saved) -> bool:
    """Whether a weight has its inputs first, as ``Conv1D`` of transformers: by its factors, and a square one by what PEFT says.

    What PEFT says it says once for all layers, of which some may be linear.
    """
    if weight.ndim != 2:
        return False
    if weight.shape[0] != weight.shape[1] and "lora_A.weight" in tensors:
        return bool(tensors["lora_A.weight"].shape[-1] == weight.shape[0])
    return bool(saved.config.get("fan_in_fan_out"))

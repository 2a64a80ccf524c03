"""Adapters to and from folders of Hugging Face PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.atomic_files import whole_folder
from lightning_peft.deltas import peft_files
from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.layout import layout_of
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.sides import why_on_weight
from lightning_peft.network.resolve import resolve_network
from lightning_peft.weights.maps import attach_map, mapped_tensors
from lightning_peft.weights.merge import check_unmerged
from lightning_peft.weights.parts import placed_parts, put_part

_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
# What says how an adapter was made or found, and changes nothing of the one that is in the file.
_OF_THE_PAST = {"target_modules", "exclude_modules", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "inference_mode"}
_OF_THE_PAST |= {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "layers_to_transform"}
_OF_THE_PAST |= {
    "layers_pattern",
    "runtime_config",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "qalora_group_size",
}


def save_peft(
    module: nn.Module, folder: str | Path, *, name: str | None = None, also: Collection[str] = (), network: str | None = None
) -> Path:
    """Write an adapter as a folder that ``peft.PeftModel.from_pretrained`` reads.

    Any delta that is a product of thin matrices is written as the LoRA that it is, for instance one of PiSSA as a LoRA of twice
    its rank beside the unchanged base, and one of AdaLoRA with the ranks that it was left.

    Args:
        module: The module, with a delta on it: in training, or after a fit of a method with ``keep=True``.
        folder: Folder to write; it must not exist or be empty, and appears only when it is complete.
        name: Name of the method whose adapter is meant, where there are several.
        also: Names of layers within the network that were trained as they are, such as ``("classifier",)``; they become
            ``modules_to_save``.
        network: Qualified name of the network that PEFT will wrap; found where it is the only one.

    Returns:
        ``folder``.

    Raises:
        MisconfigurationException: No adapter, several, one on tensors that PEFT has no place for, or a folder in use.
    """
    from safetensors.torch import save_file

    folder, (prefix, net) = Path(folder), resolve_network(module, network)
    found = list(_adapter(module, name))
    tensors: dict[str, Tensor] = {}
    ranks, alphas, config = {}, {}, _new_config(found)
    for path, layer, form, _ in found:
        inner = _within(prefix, path)
        shape = form.layout.input_shape
        down, up = (factor.detach().cpu() for factor in form.written_factors())
        magnitude = form.magnitude.detach().cpu() if isinstance(form, DecomposedForm) else None
        table = isinstance(layer, nn.Embedding)
        tensors |= peft_files.layer_keys(inner, down.reshape(-1, *shape), up, table, len(shape) - 1, magnitude)
        ranks[inner], alphas[inner] = len(down), form.scale * form.share * len(down)
    config["target_modules"] = list(ranks)
    config["r"], config["lora_alpha"] = next(iter(ranks.values())), next(iter(alphas.values()))
    config["rank_pattern"] = {key: rank for key, rank in ranks.items() if rank != config["r"]}
    config["alpha_pattern"] = {key: alpha for key, alpha in alphas.items() if alpha != config["lora_alpha"]}
    for each in also:
        tuned = net.get_submodule(each).state_dict()
        for key, value in tuned.items():
            tensors |= peft_files.whole_keys(f"{each}.{key}", value.detach().cpu().clone())
    config["modules_to_save"] = list(also) or None
    with whole_folder(folder) as part:
        save_file(tensors, part / peft_files.WEIGHTS, metadata={"format": "pt"})
        (part / peft_files.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return folder


def load_peft(module: nn.Module, folder: str | Path, *, name: str = "lora", network: str | None = None) -> list[str]:
    """Put an adapter of a PEFT folder on a module, where it stays: switched, trained on by ``LoRA(name=name)``, baked.

    Args:
        module: The module, whose network has the weights that the adapter was trained beside.
        folder: The folder.
        name: Name to know the adapter by.
        network: Qualified name of the network that PEFT wrapped; found where it is the only one.

    Returns:
        The layers that have it.

    Raises:
        MisconfigurationException: The folder is damaged, pickled or of another kind, or does not fit the network. Nothing was
            changed then.
    """
    check_unmerged(module, "another adapter")
    files, (prefix, net) = peft_files.read(Path(folder)), resolve_network(module, network)
    config = files.config
    unknown = sorted(
        key
        for key, value in config.items()
        if key not in _READ | _OF_THE_PAST and value not in (None, False, {}, [], "none", 1)
    )
    if unknown:
        warnings.warn(
            f"{folder} has settings that say nothing to this library: {', '.join(unknown)}.", UserWarning, stacklevel=2
        )
    layers = dict.fromkeys(layer for layer, _ in files.factors)
    made = [_made(net, layer, files, config, name) for layer in layers]
    own = net.state_dict(keep_vars=True)
    for key, value in files.others.items():
        if key not in own or own[key].shape != value.shape:
            have = f"has {tuple(own[key].shape)} there" if key in own else "has no such parameter"
            raise MisconfigurationException(
                f"The adapter holds {key} of shape {tuple(value.shape)}, and {type(net).__name__} {have}."
            )
    paths = [f"{prefix}.{layer}" if prefix else layer for layer in layers]
    for path, delta in zip(paths, made, strict=True):
        delta.owner, delta.method, delta.stays = "DoRA" if config.get("use_dora") else "LoRA", name, True
        if isinstance(delta, DeltaMap):
            attach_map(module, f"{path}.weight", delta)
        else:
            put_part(module, path, delta)
    with torch.no_grad():
        for key, value in files.others.items():
            own[key].copy_(value)
    return paths


def _made(net: nn.Module, name: str, files: peft_files.AdapterFiles, config: Any, adapter: str) -> DeltaPart | DeltaMap:
    """The delta of one layer, with the file's factors, for the side on which it can act."""
    down, up = files.factors[name, "down"], files.factors[name, "up"]
    try:
        layer: Any = net.get_submodule(name)
        layout = layout_of(layer, layer.weight)
    except AttributeError:
        raise MisconfigurationException(
            f"The adapter is of a layer {name!r}, which {type(net).__name__} does not have, or not with a weight. Name the "
            "network that PEFT wrapped with network=, or build the model that it was trained with."
        ) from None
    rank = up.shape[1] if up.ndim > 1 else 0
    if not 0 < rank <= layout.largest_rank:
        raise MisconfigurationException(
            f"The adapter's rank for {name!r} is {rank}; its matrix has {tuple(layout.matrix_shape)}."
        )
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha:
        raise MisconfigurationException(f"The adapter's alpha for {name!r} is {alpha!r}, not a number. Save it again.")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    kind = DecomposedForm if config.get("use_dora") else LowRankForm
    form = kind(layout, rank, scale, table=isinstance(layer, nn.Embedding))
    up = up.reshape(up.shape[:2])
    if (down.shape, up.shape) != (form.down.shape, form.up.shape):
        raise MisconfigurationException(
            f"The adapter's factors of {name!r} have shapes {tuple(down.shape)} and {tuple(up.shape)}; the layer's would be "
            f"{tuple(form.down.shape)} and {tuple(form.up.shape)}. It was trained beside another network."
        )
    with torch.no_grad():
        form.down.copy_(down)
        form.up.copy_(up)
        if isinstance(form, DecomposedForm):
            form.magnitude.copy_(files.factors[name, "magnitude"])
    form.to(layer.weight.device)
    if why_on_weight(net, name, layer, kind, adapter):
        return DeltaMap(form)
    return DeltaPart(form, float(config.get("lora_dropout") or 0.0))


def _pattern(patterns: Any, name: str, otherwise: float) -> float:
    """The value of the pattern that a name ends with, as PEFT looks it up."""
    found = (value for key, value in (patterns or {}).items() if f".{name}".endswith(f".{key}"))
    return next(found, otherwise)


def _adapter(module: nn.Module, name: str | None) -> Iterator[tuple[str, nn.Module, FactoredForm, float]]:
    """Layer by layer: name, layer, form and dropout of one method's adapter."""
    parts = [(each.path, each.layer, each.part) for each in placed_parts(module) if isinstance(each.part, DeltaPart)]
    maps = [(each, entry) for each in mapped_tensors(module) for entry in each.maps if isinstance(entry, DeltaMap)]
    names = dict.fromkeys(entry.method for entry in (*(part for _, _, part in parts), *(entry for _, entry in maps)))
    if name is None and len(names) > 1:
        raise MisconfigurationException(f"Several adapters are on the module: {', '.join(names)}. Say which with name=.")
    if not names or (name is not None and name not in names):
        there = f"; there is {', '.join(names)}" if names else ""
        raise MisconfigurationException(
            f"No adapter {'' if name is None else repr(name) + ' '}is on the module{there}. It is there during a fit, and "
            "afterwards where the method has keep=True."
        )
    wanted = name or next(iter(names))
    for tensor, entry in maps:
        if entry.method != wanted:
            continue
        path, _, key = tensor.name.rpartition(".")
        if not isinstance(entry.form, FactoredForm):
            raise MisconfigurationException(
                f"The delta of {tensor.name}, {entry.form.kind!r}, is no product of thin matrices, and those are what this "
                "library writes for PEFT. Bake it and save the whole weights."
            )
        if key != "weight":
            raise MisconfigurationException(
                f"PEFT has no place for a delta of {tensor.name}. Leave it out when training: exclude=[{path!r}]."
            )
        yield path, tensor.layer, entry.form, 0.0
    for path, layer, part in parts:
        if part.method == wanted:
            yield path, layer, part.form, part.dropout


def _within(prefix: str, path: str) -> str:
    inner = path.removeprefix(f"{prefix}.") if prefix else path
    if prefix and inner == path:
        raise MisconfigurationException(f"{path} is not within the network {prefix!r}. Name the network with network=.")
    return inner


def _new_config(found: Any) -> dict[str, Any]:
    transposed = any(form.layout.transposed for _, _, form, _ in found)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": found[0][3],
        "use_rslora": False,
        "use_dora": any(isinstance(form, DecomposedForm) for _, _, form, _ in found),
        "init_lora_weights": True,
        "fan_in_fan_out": transposed,
    }

"""Adapter folders of Hugging Face PEFT: what their two files hold, read and written without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {
    ".lora_magnitude_vector": "magnitude",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "up",
    ".lora_embedding_B": "down",
}


@dataclass(frozen=True)
class AdapterFiles:
    """The content of a folder.

    Attributes:
        config: ``adapter_config.json``.
        factors: ``(layer, "down", "up" or "magnitude")`` to tensor; those of embeddings, of which PEFT keeps the transposed, as
            a layer's.
        others: Parameters that were trained as they are, by name.
    """

    config: Mapping[str, Any]
    factors: Mapping[tuple[str, str], Tensor]
    others: Mapping[str, Tensor]


def read(folder: Path) -> AdapterFiles:
    """Read a folder.

    Raises:
        MisconfigurationException: A file is missing, damaged, pickled, or of another kind of adapter than LoRA.
    """
    config = _config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which can run any code: load it with PEFT and save it anew)"
        raise MisconfigurationException(
            f"{folder} has no {WEIGHTS}{pickled if (folder / 'adapter_model.bin').exists() else ''}. It is not the folder of "
            "an adapter, or was not written to the end."
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MisconfigurationException(f"{path} is damaged: {error}. Copy or save it again.") from None
    factors, others = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name == key:
            raise MisconfigurationException(f"{path} holds {key!r}, which is no name that PEFT gives: {_PREFIX!r} is missing.")
        ending = next((each for each in _FACTORS if name.endswith(each)), None)
        if ending is None and ".lora_" in name:
            raise MisconfigurationException(f"{path} holds {key!r}, a kind of tensor that this library does not read.")
        if ending is None:
            others[name] = tensor
        else:
            value = tensor.T if "embedding" in ending else tensor.flatten() if "magnitude" in ending else tensor
            factors[name.removesuffix(ending), _FACTORS[ending]] = value
    wanted = ("down", "up", "magnitude") if config.get("use_dora") else ("down", "up")
    for layer in dict.fromkeys(layer for layer, _ in factors):
        if {part for each, part in factors if each == layer} != {*wanted}:
            raise MisconfigurationException(f"{path} holds one factor of {layer} and not the other. Save the adapter again.")
    return AdapterFiles(config, factors, others)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MisconfigurationException(f"{folder} has no {CONFIG}. Name the folder of an adapter that PEFT saved.") from None
    except ValueError as error:
        raise MisconfigurationException(f"{path} is damaged: {error}. Copy or save it again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise MisconfigurationException(f"{path} describes {found!r}; this library reads 'LORA'. Load it with PEFT.")
    return config


def layer_keys(
    layer: str, down: Tensor, up: Tensor, embedding: bool, kernel: int, magnitude: Tensor | None = None
) -> dict[str, Tensor]:
    """Name the factors of a layer as PEFT does.

    Args:
        layer: Its name within the network.
        down: ``A``.
        up: ``B``, shape ``(outputs, rank)``.
        embedding: Whether it is an embedding.
        kernel: Dimensions of its kernel.
        magnitude: Lengths of the rows of a DoRA.
    """
    start = f"{_PREFIX}{layer}"
    if embedding:
        return {f"{start}.lora_embedding_A": up.T.contiguous(), f"{start}.lora_embedding_B": down.T.contiguous()}
    found = {
        f"{start}.lora_A.weight": down.contiguous(),
        f"{start}.lora_B.weight": up.reshape(*up.shape, *(1,) * kernel).contiguous(),
    }
    if magnitude is not None:  # for a convolution PEFT keeps it in the shape of the output
        found[f"{start}.lora_magnitude_vector"] = magnitude.view(1, -1, *(1,) * kernel) if kernel else magnitude
    return found


def whole_keys(name: str, value: Tensor) -> dict[str, Tensor]:
    """Name a parameter that was trained as it is."""
    return {f"{_PREFIX}{name}": value.contiguous()}

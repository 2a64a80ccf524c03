"""Adapter folders of Hugging Face PEFT: what their two files hold, read and written without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.atomic_files import whole_folder
from lightning_peft.deltas.peft_format import PeftFormat, Saved
from lightning_peft.deltas.peft_formats import format_of, known

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODEL, _NETWORK = "base_model.", "base_model.model."


def read(folder: Path) -> tuple[PeftFormat, Saved]:
    """Read a folder.

    Raises:
        MisconfigurationException: A file is missing, damaged, pickled, of a type of adapter that nothing here reads, or without
            a tensor that it should have.
    """
    config = _config(folder)
    kind = format_of(config)
    if kind is None:
        types = ", ".join(name for name in known() if "." not in name)
        raise MisconfigurationException(
            f"{folder / CONFIG} describes {config.get('peft_type')!r}; this library reads {types}. Load it with PEFT."
        )
    path = folder / WEIGHTS
    layers: dict[str, dict[str, Tensor]] = {}
    shared, others = {}, {}
    names = frozenset().union(*kind.complete(config))
    for key, tensor in _tensors(folder).items():
        whole = key.removeprefix(_MODEL)
        if key.startswith(_MODEL) and whole in kind.shared:
            shared[whole] = _numbers(path, key, tensor)
            continue
        name = key.removeprefix(_NETWORK)
        if name == key:
            raise MisconfigurationException(f"{path} holds {key!r}, which is no name that PEFT gives: {_NETWORK!r} is missing.")
        ending = next((each for each in names | kind.shared if name.endswith(f".{each}")), None)
        if ending is None and f".{kind.beginning}" in name:
            raise MisconfigurationException(f"{path} holds {key!r}, a kind of tensor that this library does not read.")
        if ending is None:
            others[name] = tensor
        elif ending in kind.shared:  # every layer has it once more
            shared.setdefault(ending, _numbers(path, key, tensor))
        else:
            layers.setdefault(name.removesuffix(f".{ending}"), {})[ending] = _numbers(path, key, tensor)
    for layer, tensors in layers.items():
        _check_complete(path, layer, tensors, kind, config)
    if not layers:
        raise MisconfigurationException(f"{path} holds no adapter of any layer. It was not written to the end: save it again.")
    saved = Saved(folder, config, layers, shared, others)
    kind.check(saved)
    return kind, saved


def _check_complete(path: Path, layer: str, tensors: Mapping[str, Tensor], kind: PeftFormat, config: Mapping[str, Any]) -> None:
    sets = kind.complete(config)
    if frozenset(tensors) in sets:
        return
    nearest = max(sets, key=lambda each: len(each & tensors.keys()))
    missing, more = (", ".join(sorted(each)) for each in (nearest - tensors.keys(), tensors.keys() - nearest))
    raise MisconfigurationException(
        f"{path} holds {'more' if not missing else 'not all'} of the adapter of {layer}: "
        f"{f'{missing} is missing' if missing else f'{more} is of another kind'}. Save the adapter again."
    )


def _numbers(path: Path, key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise MisconfigurationException(f"{path} holds {key!r} as {tensor.dtype}; adapters are of floating point.")
    return tensor


def _tensors(folder: Path) -> dict[str, Tensor]:
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
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MisconfigurationException(f"{path} is damaged: {error}. Copy or save it again.") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise MisconfigurationException(f"{folder} has no {CONFIG}. Name the folder of an adapter that PEFT saved.") from None
    except (ValueError, RecursionError) as error:
        raise MisconfigurationException(f"{path} is damaged: {error}. Copy or save it again.") from None
    if not isinstance(config, dict):
        raise MisconfigurationException(f"{path} describes {config!r}, no adapter. Copy or save it again.")
    return config


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
    """Write a folder, which appears only when it is complete.

    Args:
        folder: The folder; it must not exist or be empty.
        config: Settings.
        tensors: Tensors by their names within the network.
        shared: Those that stand beside the network.

    Raises:
        MisconfigurationException: The folder is in use.
    """
    from safetensors.torch import save_file

    named = {f"{_NETWORK}{name}": value for name, value in tensors.items()}
    named |= {f"{_MODEL}{name}": value for name, value in shared.items()}
    values = {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}
    with whole_folder(folder) as part:
        save_file(values, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

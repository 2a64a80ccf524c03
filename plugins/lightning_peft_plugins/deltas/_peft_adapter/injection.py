"""What PEFT would do to a network, found out on a copy without values, and its adapter layers, built one at a time."""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib.util
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.weights.map_modules import MapModules

ADAPTER = "default"
_OF_DATA = ("eva", "lora_ga")
_OF_LOOP = ("use_asa", "monteclora_config")
_NOT_FROM_FILES = ("megatron_config", "megatron_core", "auto_mapping")  # PEFT imports what these name


@dataclass(frozen=True)
class Injection:
    """What PEFT would put into a network.

    Attributes:
        paths: Names of the layers that get an adapter, in the network's order.
        config: The configuration with its targets found, as plain data.
        beside: Names of parameters outside of adapters that it would train.
    """

    paths: tuple[str, ...]
    config: Mapping[str, Any]
    beside: tuple[str, ...]


def check_installed() -> None:
    """See that PEFT is there.

    Raises:
        MisconfigurationException: It is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise MisconfigurationException('PeftAdapter needs Hugging Face PEFT: pip install "lightning-peft[interop]"')


def plain_config(config: Any) -> dict[str, Any]:
    """Return what a configuration of PEFT says beyond its defaults, as plain data.

    Args:
        config: The configuration, or its data as ``adapter_config.json`` has it.

    Raises:
        MisconfigurationException: It is neither.
    """
    if isinstance(config, Mapping):
        config = built_config(config)
    if isinstance(config, type) or not hasattr(config, "peft_type") or not dataclasses.is_dataclass(config):
        raise MisconfigurationException(
            f"config={config!r} is no configuration of PEFT. Give one, such as peft.LoraConfig(target_modules=['query'])."
        )
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    said = {name: getattr(config, name) for name, default in defaults.items() if getattr(config, name) != default}
    return {
        "peft_type": _plain(config.peft_type),
        **{name: _plain(value) for name, value in said.items() if name != "peft_type"},
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return {str(key): _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def built_config(data: Mapping[str, Any]) -> Any:
    """Make the configuration that plain data describe.

    Raises:
        MisconfigurationException: PEFT has no such type or argument.
    """
    import peft

    types = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if data.get("peft_type") not in types:
        known = ", ".join(sorted(each.value for each in types))
        raise MisconfigurationException(f"config needs a peft_type, one of {known}; it has {data.get('peft_type')!r}.")
    if refused := [name for name in _NOT_FROM_FILES if data.get(name)]:
        raise MisconfigurationException(f"config names Python modules to import, in {refused[0]}. Leave that out.")
    cls = types[data["peft_type"]]
    arguments = {name: value for name, value in data.items() if name != "peft_type"}
    if unknown := sorted(arguments.keys() - {field.name for field in dataclasses.fields(cls)}):
        raise MisconfigurationException(f"{cls.__name__} has no argument {unknown[0]!r}. Take it out of config.")
    if data.get("init_lora_weights") in _OF_DATA:
        raise MisconfigurationException(
            f"init_lora_weights={data['init_lora_weights']!r} needs a pass over data that PEFT leaves to its user, and without "
            "it would be something else. Set init_lora_weights=True."
        )
    if asked := next((name for name in _OF_LOOP if data.get(name)), None):
        raise MisconfigurationException(
            f"{asked} needs more of a training loop than PeftAdapter gives it, and remembers what no file would hold. Leave "
            f"{asked} out."
        )
    try:
        return cls(**arguments)
    except (ImportError, TypeError, ValueError) as error:
        raise MisconfigurationException(f"{cls.__name__} does not take config: {error}") from error


_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], Injection]] = weakref.WeakKeyDictionary()
"""What was found out of a network last, with the question: a configuration, and the names of its layers."""


def injection(data: Mapping[str, Any], network: nn.Module) -> Injection:
    """Find out what PEFT would put into a network, which stays as it is.

    Raises:
        MisconfigurationException: PEFT refuses, or it would do more than put adapter layers round layers.
    """
    question = (str(data), *(name for name, _ in type(network).named_modules(network)))  # without parts that stand on it
    known = _FOUND.get(network)
    if known is None or known[0] != question:
        _FOUND[network] = known = (question, _injected(data, network))
    return known[1]


def _injected(data: Mapping[str, Any], network: nn.Module) -> Injection:
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    config, twin = built_config(data), _without_values(network)
    before = {name: type(part) for name, part in twin.named_modules()}
    try:
        peft.inject_adapter_in_model(config, twin, ADAPTER, low_cpu_mem_usage=True)
    except Exception as error:  # whatever a tuner says of a network
        raise MisconfigurationException(
            f"PEFT does not put {type(config).__name__} into {type(network).__name__}: {error} PeftAdapter takes tuners that "
            "put a layer of theirs round single layers (peft.inject_adapter_in_model)."
        ) from error
    paths = tuple(name for name, part in twin.named_modules() if name in before and isinstance(part, BaseTunerLayer))
    inside = tuple(f"{path}." for path in paths)
    for name, part in twin.named_modules():
        if not name.startswith(inside) and name not in paths and before.get(name) is not type(part):
            raise MisconfigurationException(
                f"{type(config).__name__} would also put a {type(part).__name__} at {name}. Leave out what asks for it "
                "(modules_to_save, trainable_token_indices, layer_replication); tune=('head',) trains the head beside."
            )
    _check_apart(config, {path: twin.get_submodule(path) for path in paths})
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in twin.named_parameters()}
    known = dict(network.named_parameters())
    beside = tuple(name for name, tensor in own.items() if tensor.requires_grad and name in known)
    return Injection(paths, plain_config(config), beside)


def _check_apart(config: Any, tuners: Mapping[str, nn.Module]) -> None:
    """Refuse adapters that share tensors, for each is built, saved and merged on its own."""
    owners: dict[int, str] = {}
    for path, tuner in tuners.items():
        for name, tensor in (*tuner.named_parameters(), *tuner.named_buffers()):
            if owners.setdefault(id(tensor), path) != path:
                raise MisconfigurationException(
                    f"{type(config).__name__} lets {owners[id(tensor)]} and {path} share {name}. PeftAdapter takes tuners "
                    "whose layers stand alone; for this one use peft.get_peft_model on the network."
                )


def _without_values(network: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    twin = deep_copy(network, memo)
    MapModules.hide(twin)  # adapters that stand beside layers already are none of PEFT's business
    return twin


def peft_layer(data: Mapping[str, Any], path: str, layer: nn.Module) -> Any:
    """Return the adapter layer that PEFT puts round one layer of a network.

    Args:
        data: The configuration with its targets found, as plain data.
        path: Name of the layer in the network.
        layer: The layer, which becomes its ``base_layer``.
    """
    import peft

    root = holder = nn.Module()
    *above, name = path.split(".")
    for each in above:
        holder.add_module(each, nn.Module())
        holder = holder.get_submodule(each)
    holder.add_module(name, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patterns that are about other layers were looked at in the whole network
        peft.inject_adapter_in_model(copy.deepcopy(built_config(data)), root, ADAPTER)
    return root.get_submodule(path)

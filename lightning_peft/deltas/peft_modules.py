"""What was trained as it is beside an adapter: ``modules_to_save`` and biases of PEFT's folders."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.deltas.peft_format import Adapted, PeftFormat, Saved
from lightning_peft.network.layers import own_parameters
from lightning_peft.network.tunable import TUNABLE, tunable
from lightning_peft.weights.maps import mapped_tensors

_BASE = "base_layer"  # PEFT's name of a layer that stands within an adapter
_COPY, _FIRST = "modules_to_save", "original_module"  # and of one that was trained whole, with the one it was before
_LISTS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass
class Tuned:
    """Parameters that were trained as they are, as PEFT has them.

    Attributes:
        modules: Names of whole modules.
        tensors: Values, by their names in a file.
        biases: Whether there are biases among them.
    """

    modules: list[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's settings."""
        return {"modules_to_save": self.modules or None, "bias": "all" if self.biases else "none"}


def tuned_names(module: nn.Module, tune: Iterable[str], adapted: Collection[str]) -> list[str]:
    """Names of the parameters that were trained as they are.

    Args:
        module: The module.
        tune: Kinds of :data:`~lightning_peft.network.tunable.TUNABLE`, or names.
        adapted: Names of the layers with an adapter.
    """
    said = set(tune)
    found = tunable(module, said & {*TUNABLE}, adapted)
    every = module.named_parameters(remove_duplicate=False)  # what is tied stands in two places of PEFT
    return [name for name, value in every if value in found or name in said]


def tuned(net: nn.Module, names: Sequence[str], also: Sequence[str], adapted: Sequence[Adapted], kind: PeftFormat) -> Tuned:
    """Sort what was trained into whole modules, which become ``modules_to_save``, and single parameters.

    Args:
        net: The network.
        names: Its parameters that were trained as they are.
        also: Names of further modules.
        adapted: The layers with an adapter.
        kind: Type of the adapter.

    Raises:
        MisconfigurationException: ``also`` names no module of the network, or one with an adapter in it.
    """
    layers = {each.name for each in adapted}
    by_layer: dict[str, list[str]] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        by_layer.setdefault(path, []).append(key)
    whole = [path for path, keys in by_layer.items() if path not in layers and _is_whole(net, path, keys)]
    modules = _outermost([*also, *whole])
    for name in modules:
        _check_module(net, name, layers)
    values = _values(net)
    safe = _found_by_peft(net, modules, adapted, kind)
    made = Tuned([name for name in modules if name in safe])
    for name in [*modules, *safe]:
        made.tensors |= {key: value for key, value in values.items() if key.startswith(f"{name}.")}
    for path, keys in by_layer.items():
        if any(f"{path}.".startswith(f"{name}.") for name in modules):
            continue
        for key in keys:
            name = f"{path}.{key}".removeprefix(".")
            made.tensors[f"{path}.{_BASE}.{key}" if path in layers else name] = values[name]
            made.biases |= key == "bias"
    return made


def _is_whole(net: nn.Module, path: str, keys: Sequence[str]) -> bool:
    return bool(path) and set(keys) >= set(own_parameters(net.get_submodule(path)))


def _outermost(names: Iterable[str]) -> list[str]:
    """The names that lie within no other one, each once."""
    once = list(dict.fromkeys(names))
    return [name for name in once if not any(name.startswith(f"{other}.") for other in once)]


def _check_module(net: nn.Module, name: str, layers: Collection[str]) -> None:
    try:
        net.get_submodule(name)
    except AttributeError:
        children = [path for path, _ in net.named_children()]
        raise MisconfigurationException(
            f"also= names {name!r}, which {type(net).__name__} does not have. Names are those within the network: {children}."
        ) from None
    if inner := [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]:
        raise MisconfigurationException(
            f"also= names {name!r}, and {inner[0]} has an adapter. PEFT has one or the other: train with exclude={inner!r}, or "
            "name its other layers."
        )


def _values(net: nn.Module) -> dict[str, Tensor]:
    """The state of a network as an ordinary one has it."""
    return net.state_dict() | {mapped.name: mapped.baked() for mapped in mapped_tensors(net)}


def _found_by_peft(net: nn.Module, modules: Sequence[str], adapted: Sequence[Adapted], kind: PeftFormat) -> list[str]:
    """The modules that PEFT finds by these names, which it takes for the ends of names; none of those that it cannot part."""
    inner = {_BASE, "default", kind.dropout, *kind.shared}
    inner |= {name.partition(".")[0] for each in kind.tensors for name in each}
    own = {f"{each.name}.{name}" for each in adapted for name in inner}
    layers = {each.name for each in adapted}
    found: dict[str, None] = {}
    for name in modules:
        matches = [path for path, _ in net.named_modules() if path.endswith(name)]
        bad = [path for path in (*own, *matches) if path.endswith(name) and (path in own or _not_to_save(net, path, layers))]
        if bad:
            warnings.warn(
                f"PEFT finds modules_to_save by the ends of their names, and {name!r} is also the end of {min(bad)!r}. Its "
                "values are in the folder and PEFT loads them into the network, but does not switch or save them with the "
                "adapter. Give the layer another name in the network.",
                UserWarning,
                stacklevel=4,
            )
        else:
            found |= dict.fromkeys(matches)
    return list(found)


def _not_to_save(net: nn.Module, path: str, layers: Collection[str]) -> bool:
    return isinstance(net.get_submodule(path), _LISTS) or any(f"{layer}.".startswith(f"{path}.") for layer in layers)


def loaded(net: nn.Module, saved: Saved) -> dict[str, Tensor]:
    """The parameters of a folder that were trained as they are, by their names within the network.

    Raises:
        MisconfigurationException: One does not fit the network, or a module that the folder names is not whole.
    """
    modules = {path: [key for key, _ in part.named_parameters(prefix=path)] for path, part in net.named_modules()}
    return _matched(net.state_dict(keep_vars=True), modules, saved, type(net).__name__)


def loaded_by_name(own: Mapping[str, Tensor], saved: Saved, owner: str) -> dict[str, Tensor]:
    """The same where only the names and tensors of a network are known.

    Args:
        own: The network's tensors.
        saved: The folder.
        owner: What messages call the network.
    """
    modules: dict[str, list[str]] = {}
    for name in own:
        path = name
        while path:
            path = path.rpartition(".")[0]
            modules.setdefault(path, []).append(name)
    return _matched(own, modules, saved, owner)


def _matched(own: Mapping[str, Tensor], modules: Mapping[str, Sequence[str]], saved: Saved, owner: str) -> dict[str, Tensor]:
    """See :func:`loaded`; ``modules`` holds the names of the parameters within each module."""
    found = {}
    for key, value in saved.others.items():
        if key not in own and f".{_FIRST}." in key:
            continue
        name = key if key in own else key.replace(f".{_BASE}.", ".").replace(f".{_COPY}.", ".")
        if name not in own or own[name].shape != value.shape:
            have = f"has {tuple(own[name].shape)} there" if name in own else "has no such parameter"
            raise MisconfigurationException(f"The adapter holds {key} of shape {tuple(value.shape)}, and {owner} {have}.")
        found[name] = value
    _check_whole(modules, saved, found)
    return found


def _check_whole(modules: Mapping[str, Sequence[str]], saved: Saved, found: Mapping[str, Tensor]) -> None:
    names = saved.config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise MisconfigurationException(f"modules_to_save of {saved.path} is {names!r}, no list of names. Save it again.")
    for path, parameters in modules.items():
        if path.endswith(tuple(names)) and not any(f"{layer}.".startswith(f"{path}.") for layer in saved.layers):
            missing = [key for key in parameters if key not in found]
            if missing:
                raise MisconfigurationException(
                    f"{saved.path} names {path!r} among modules_to_save, and its file lacks {missing[0]}. It was not written "
                    "to the end, or belongs to another network: save the adapter again."
                )

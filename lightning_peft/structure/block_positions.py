"""What belongs to the position of a block, as the class of the network builds it, and what an edit of depth must put right.

Two networks that the class builds (:mod:`lightning_peft.structure.class_twin`), before and after the edit, say which
configuration counts the blocks and which plain attributes depend on it. What an edited network must have beyond that and
cannot be given is the first difference, for which the edit is refused.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.network.plain_class import plain_class
from lightning_peft.structure.class_twin import class_twin, rebuilt
from lightning_peft.structure.depth_config import Place, candidates, counters, value_at, with_values
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.twin_comparison import MISSING, blocks_of, difference, has_tensors, moved

Noted: TypeAlias = "list[Callable[[nn.Module], None]]"
"""What gives a module back what an edit wrote over."""

# Lists with an entry a block, as the class built them, of networks whose training began with fewer blocks.
_BUILT: weakref.WeakKeyDictionary[nn.Module, dict[Place, list[Any]]] = weakref.WeakKeyDictionary()


@dataclass
class Positions:
    """What an edit of depth has to write, so that the class of the network builds what it leads to.

    Attributes:
        path: Qualified name of the list.
        owner: Qualified name of the network that its class rebuilds.
        config: What its configuration says afterwards, by place.
        attributes: Attributes of layers outside the list, by qualified name.
        blocks: Attributes of layers of each new block, by name in the block; a module where a layer without tensors stands.
        buffers: Values of buffers that are not saved, of each new block, by name in the block.
        further: Buffers outside the list that are not saved and that the network had no need of before, by qualified name.
    """

    path: str
    owner: str
    config: dict[Place, Any]
    attributes: dict[str, dict[str, Any]]
    blocks: list[dict[str, dict[str, Any]]]
    buffers: list[dict[str, Tensor]]
    further: dict[str, Tensor]

    def before(self, module: nn.Module, blocks: Sequence[nn.Module]) -> Noted:
        """Return what gives back what :meth:`write` writes over; ask before anything else is changed."""
        config = vars(module.get_submodule(self.owner))["config"]
        undo: Noted = [_restorer(value_at(config, place[:-1]), place[-1]) for place in self.config]
        undo += [_outer(module, name, key) for name, values in self.attributes.items() for key in values]
        for block, changes, tensors in zip(blocks, self.blocks, self.buffers, strict=True):
            undo += [_restorer(block.get_submodule(name), key) for name, values in changes.items() for key in values]
            undo += [_restorer(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in tensors]
        return undo

    def write(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Write everything, with the new blocks in place."""
        config = vars(module.get_submodule(self.owner))["config"]
        for place, value in self.config.items():
            setattr(value_at(config, place[:-1]), place[-1], copy.deepcopy(value))
        for name, values in self.attributes.items():
            for key, value in values.items():
                _set(_holder(module, name), key, value)
        for block, changes, tensors in zip(blocks, self.blocks, self.buffers, strict=True):
            for name, values in changes.items():
                for key, value in values.items():
                    _set(block.get_submodule(name), key, value)
            for name, tensor in tensors.items():
                path, _, key = name.rpartition(".")
                layer = block.get_submodule(path)
                setattr(layer, key, tensor.to(getattr(layer, key).device))
        device = next((tensor.device for tensor in module.parameters()), None)
        for name, tensor in self.further.items():
            path, _, key = name.rpartition(".")
            module.get_submodule(path).register_buffer(key, tensor.to(device), persistent=False)


def _holder(module: nn.Module, name: str) -> Any:
    """A layer outside the list, or the configuration that it holds."""
    config, _, path = name.rpartition("|")
    layer = module.get_submodule(path)
    return vars(layer)["config"] if config else layer


def _outer(module: nn.Module, name: str, key: str) -> Callable[[nn.Module], None]:
    """Restore what stands outside the list by its name: the layer itself would hold the list, and a journal that."""
    before = getattr(_holder(module, name), key, MISSING)
    return lambda whole: _set(_holder(whole, name), key, before)


def _restorer(holder: Any, key: str) -> Callable[[nn.Module], None]:
    before = getattr(holder, key, MISSING)
    return lambda _: _set(holder, key, before)


def _set(holder: Any, key: str, value: Any) -> None:
    if value is MISSING:
        if hasattr(holder, key):
            delattr(holder, key)
        return
    if isinstance(holder, nn.Module) and isinstance(value, nn.Module) and key not in holder._modules:
        vars(holder).pop(key, None)
    elif isinstance(holder, nn.Module) and key in holder._modules and not isinstance(value, nn.Module):
        del holder._modules[key]
    setattr(holder, key, copy.deepcopy(value) if isinstance(value, (list, dict)) else value)


def positions(module: nn.Module, path: str, sources: Sequence[int], *, shared: bool = False) -> Positions | None:
    """Find what an edit of depth has to write.

    Args:
        module: The module, before the edit.
        path: Qualified name of the list.
        sources: Old position of every new block.
        shared: Whether new blocks of one source will be one block.

    Returns:
        What to write; ``None`` when no class can be asked: no network around the list is built from a configuration alone.

    Raises:
        CheckpointError: The class cannot build what the edit leads to.
    """
    old: list[nn.Module] = list(module.get_submodule(path)._modules.values())  # type: ignore[arg-type]
    for name, network in rebuilt(module, path):
        inside = path.removeprefix(f"{name}.") if name else path
        now = class_twin(network, vars(network)["config"])
        if now is None or len(blocks_of(now, inside)) != len(old):
            continue
        values, then = _built(network, now, path, inside, sources, module)
        found = _outside(network, now, then, inside)
        attributes = {_join(name, layer): keys for layer, keys in found.items()}
        blocks = [
            _changes(old[source], blocks_of(now, inside)[source], blocks_of(then, inside)[place])
            for place, source in enumerate(sources)
        ]
        if shared:
            _check_shared(network, path, blocks_of(then, inside), sources)
            blocks = [_of_first(changes, sources, place) for place, changes in enumerate(blocks)]
        buffers, further = _buffers(network, then, with_values(vars(network)["config"], values), inside, old)
        return Positions(path, name, values, attributes, blocks, buffers, {_join(name, key): v for key, v in further.items()})
    return None


def other_at_its_place(module: nn.Module, path: str, sources: Sequence[int]) -> str:
    """Say which old block the class builds otherwise at its new position, with the attribute; ``""`` where there is none."""
    placed = positions(module, path, sources)
    if placed is None:
        return ""
    blocks: list[nn.Module] = list(module.get_submodule(path)._modules.values())  # type: ignore[arg-type]
    for source in dict.fromkeys(sources):
        place = sources.index(source)
        for name, values in placed.blocks[place].items():
            for key, value in values.items():
                before = getattr(blocks[source].get_submodule(name), key, None)
                if not _counts(key, before, value, source, place):
                    shown = f"{name}.{key}" if name else key
                    return f"block {source} of {path} becomes block {place} and has {shown} = {value!r}, not {before!r},"
    return ""


def _join(prefix: str, name: str) -> str:
    kind, bar, name = name.rpartition("|")
    return kind + bar + (f"{prefix}.{name}" if prefix and name else prefix or name)


def _built(
    network: nn.Module, now: nn.Module, path: str, inside: str, sources: Sequence[int], module: nn.Module
) -> tuple[dict[Place, Any], nn.Module]:
    """Find the configuration from which the class builds the edited network, and build it.

    Raises:
        CheckpointError: There is none; names the first difference of the nearest.
    """
    config, before = vars(network)["config"], len(blocks_of(now, inside))
    built = _BUILT.setdefault(module.get_submodule(path), {})
    nearest = ""
    for counter in counters(config, before) if len(sources) != before else ():
        for values in candidates(config, counter, before, sources, built):
            twin = class_twin(network, with_values(config, values))
            if twin is None or len(blocks_of(twin, inside)) != len(sources):
                continue
            found = difference(now, twin, inside, sources)
            if found is None:
                for place in values:
                    value = value_at(config, place)
                    if isinstance(value, (list, tuple)) and len(value) == before > len(built.get(place, ())):
                        built[place] = list(value)
                return values, twin
            nearest = nearest or f"with {counter}={len(sources)} it has {found}"
    if len(sources) == before:
        found = difference(now, now, inside, sources)
        if found is None:
            return {}, now
        nearest = found
    raise CheckpointError(
        f"{plain_class(network).__name__} cannot build {path} with {len(sources)} blocks from {list(sources)}, so that what is "
        f"saved would be another network when it is loaded: {nearest or 'no number of its configuration makes it do so'}. "
        'Choose another number of blocks, another operator or another list (blocks=), or give check="off" if you will not '
        "load it by that class."
    )


def _outside(network: nn.Module, now: nn.Module, then: nn.Module, inside: str) -> dict[str, dict[str, Any]]:
    """What layers outside the list, and the configurations they hold, note otherwise."""
    found: dict[str, dict[str, Any]] = {}
    layers, others = dict(network.named_modules()), dict(then.named_modules())
    for name, before in now.named_modules():
        if f"{name}.".startswith(f"{inside}.") or name not in layers or name not in others:
            continue
        found[name] = moved(layers[name], before, others[name])
        own, *twins = (vars(each).get("config") for each in (layers[name], before, others[name]))
        # A stack can hold a copy of the network's configuration that counts under another name (T5).
        if name and all(hasattr(each, "__dict__") for each in (own, *twins)) and own is not vars(network).get("config"):
            found[f"config|{name}"] = moved(own, *twins)
    return {name: values for name, values in found.items() if values}


def _changes(live: nn.Module, now: nn.Module, then: nn.Module) -> dict[str, dict[str, Any]]:
    """What layers of a block note otherwise at its new position."""
    layers, before, after = (dict(block.named_modules()) for block in (live, now, then))
    found = {name: moved(layers[name], before[name], after[name]) for name in before if name in after and name in layers}
    for name, layer in after.items():
        parent, _, key = name.rpartition(".")
        same = name in before and type(before[name]) is type(layer)
        if (
            same
            or not name
            or has_tensors(layer)
            or parent not in found
            or type(layers.get(name)) is not type(before.get(name))
        ):
            continue
        found.pop(name, None)
        found[parent][key] = layer
    for name, layer in before.items():
        parent, _, key = name.rpartition(".")
        gone = name not in after and parent in after and name in layers and not has_tensors(layer)
        if gone and key not in vars(after[parent]):
            found[parent][key] = MISSING
    return {name: values for name, values in found.items() if values}


def _check_shared(network: nn.Module, path: str, blocks: Sequence[nn.Module], sources: Sequence[int]) -> None:
    """Refuse to let one block stand at positions at which the class makes different ones.

    The number of a layer is one at all of them, and so is its rate of stochastic depth.

    Raises:
        CheckpointError: See above; names the first attribute.
    """
    first: dict[int, int] = {}
    for place, source in enumerate(sources):
        start = first.setdefault(source, place)
        for name, values in _changes(blocks[start], blocks[start], blocks[place]).items():
            for key, value in values.items():
                before = getattr(blocks[start].get_submodule(name), key, None)
                if _counts(key, before, value, start, place):
                    continue
                shown = f"{name}.{key}" if name else key
                raise CheckpointError(
                    f"One block cannot stand at positions {start} and {place} of {path}: {plain_class(network).__name__} "
                    f"builds them with {shown} = {before!r} and {value!r}. Give stages within which blocks are alike, or "
                    'check="off" to let them be as at the first position.'
                )


def _of_first(changes: dict[str, dict[str, Any]], sources: Sequence[int], place: int) -> dict[str, dict[str, Any]]:
    """What a shared block has of its first position; the edit says its rate itself."""
    if sources[place] in sources[:place]:
        return {}
    return {name: {key: value for key, value in values.items() if not _is_rate(key, value)} for name, values in changes.items()}


def _counts(key: str, before: Any, value: Any, old: int, new: int) -> bool:
    """Whether an attribute is the number of a layer, or a rate of stochastic depth: what is another at every position."""
    number = type(before) is type(value) is int and (before, value) == (old, new)
    return number or _is_rate(key, value) or _is_rate(key, before)


def _is_rate(key: str, value: Any) -> bool:
    """Whether an attribute is, or a layer has, a rate of stochastic depth."""
    return "drop" in key or hasattr(value, "drop_prob")


def _buffers(
    network: nn.Module, then: nn.Module, config: Any, inside: str, old: Sequence[nn.Module]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Values of buffers that no file holds: those the class makes differently at different positions, and those it adds."""
    in_blocks = {name for block in old for name in _unsaved(block)}
    own = dict(network.named_buffers())
    new = [name for name in _unsaved(then) if name not in own and not name.startswith(f"{inside}.")]
    built = class_twin(network, config, buffers=True) if in_blocks or new else None
    if built is None:
        return [{} for _ in blocks_of(then, inside)], {}
    made = [{name: value for name, value in _unsaved(block).items() if name in in_blocks} for block in blocks_of(built, inside)]
    first = made[0]
    by_position = {
        name
        for values in made[1:]
        for name, value in values.items()
        if name in first and (value.shape != first[name].shape or not torch.equal(value, first[name]))
    }
    blocks = [{name: value for name, value in values.items() if name in by_position} for values in made]
    return blocks, {name: value for name, value in _unsaved(built).items() if name in new}


def _unsaved(block: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}" if name else key: layer._buffers[key]
        for name, layer in block.named_modules()
        for key in layer._non_persistent_buffers_set
        if layer._buffers.get(key) is not None
    }


def undo_noted(module: nn.Module, noted: Noted) -> None:
    """Give back what :meth:`Positions.before` has seen."""
    for restore in reversed(noted):
        restore(module)

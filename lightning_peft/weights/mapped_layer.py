"""A layer under weight maps: its parameters stay where they are, and reading one gives what the maps make of it.

``torch.nn.utils.parametrize`` moves a parameter into a submodule, which renames it, puts it behind the others in
``parameters()`` and makes the module impossible to pickle. Code that pairs two networks by position, as every moving average
of a network does, would then pair weights with biases. Here only the class of the layer changes, and only while maps are on.

Layer parts stand beside a layer by the same means: a call of it goes through them, and it has no submodule more.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft.compose.lanes import Lane
from lightning_peft.network.plain_class import StandIn
from lightning_peft.weights.part_stack import PartStack
from lightning_peft.weights.sharded_view import is_shown, stored_values
from lightning_peft.weights.shards import is_shard, is_split, read_whole, replicate, spread_as, whole
from lightning_peft.weights.weight_map import WeightMap


class MapChain:
    """The maps on one parameter, innermost first.

    Attributes:
        maps: The maps.
        pristine: Value the parameter had before the maps came, as long as going back to it means anything.
        version: Counts in-place changes of the parameter; ``pristine`` is void once it has moved on.
    """

    def __init__(self) -> None:
        self.maps: list[WeightMap] = []
        self.pristine: Tensor | None = None
        self.version = 0

    @property
    def active(self) -> list[WeightMap]:
        """The maps that are switched on."""
        return [weight_map for weight_map in self.maps if weight_map.enabled]

    def __call__(self, stored: Tensor) -> Tensor:
        """Return the weight the layer sees, whole where the stored value is spread over processes: all of them have to ask.

        Where layers compute with parts of it, it is spread as it was.
        """
        if is_shard(stored):
            split = is_split(stored)
            if split and all(weight_map.splits(stored) for weight_map in self.active):
                return spread_as(stored, self._mapped(stored))  # type: ignore[no-any-return]
            with read_whole(*self.maps):
                value = self._mapped(whole(stored))
            return spread_as(stored, value) if split else value
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        return _untraced(self._mapped, stored) if tracing else self._mapped(stored)

    def _mapped(self, stored: Tensor) -> Tensor:
        frozen, value = not stored.requires_grad, stored
        for weight_map in self.maps:
            if not weight_map.enabled:
                continue
            if frozen and weight_map.lane == Lane.REPARAM:  # the other view of a frozen tensor is frozen
                with torch.no_grad():
                    value = weight_map(value)
            else:
                value = weight_map.bake(value) if weight_map.as_baked else weight_map(value)
        return value

    @torch.no_grad()
    def value_of(self, stored: Tensor, states: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the weight that other tensors, an average's for one, give under these maps as they act now.

        Args:
            stored: Stored value.
            states: Of each map, values for its parameters and buffers by name; anything else in them is passed over.
        """
        value = stored
        for weight_map, state in zip(self.maps, states, strict=True):
            if not weight_map.enabled:
                continue
            own = {name for name, _ in (*weight_map.named_parameters(), *weight_map.named_buffers())}
            value = functional_call(weight_map, {name: state[name] for name in own & state.keys()}, (value,))
        return value.detach()

    @torch.no_grad()
    def enter(self, value: Tensor, outermost: WeightMap | None = None) -> Tensor:
        """Return what is stored for a plain value that comes in; masks and maps without ``right_inverse`` leave it as it is.

        Args:
            value: The value.
            outermost: Map that the value comes out of; by default the last one.

        Raises:
            ValueError: A map has no stored value for it.
        """
        inside = self.maps if outermost is None else self.maps[: self.maps.index(outermost) + 1]
        for weight_map in reversed([entry for entry in inside if entry.enabled]):
            inverse = getattr(weight_map, "right_inverse", None)
            if inverse is not None and weight_map.lane < Lane.MASK:
                value = inverse(value)
        return value

    def bake(self, stored: Tensor) -> Tensor:
        """Return the weight of an ordinary layer, without a graph."""
        value = stored.detach()
        with torch.no_grad():
            for weight_map in self.active:
                value = weight_map.bake(value)
        return value.detach()


@torch.no_grad()
def _untraced(function: Callable[[Tensor], Tensor], stored: Tensor) -> Tensor:
    """Have ``torch.jit.trace`` record the result as a constant: what maps hold is in no module it knows."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return function(stored)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


class MappedLayer(StandIn):
    """Additions to the class of a layer while maps are on its parameters, or parts beside it.

    In a state dict a parameter under maps goes by the names ``torch.nn.utils.parametrize`` would give it,
    ``parametrizations.weight.original`` and ``parametrizations.weight.0.<...>``, so that no module without maps loads a file
    of stored values by mistake. Weights of an ordinary module that are loaded become what the layer computes with, as far as
    its masks let it.
    """

    weight_maps: dict[str, MapChain]
    part_stack: PartStack | None = None

    @property
    def layer_parts(self) -> nn.Module:
        """The parts as modules, where ``functional_call`` looks for them by name."""
        view = nn.Module()
        for part in self.part_stack or ():
            view.add_module(part.key, part)
        return view

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().named_children()
        yield from self._shown()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name, module in () if remove_duplicate else self._shown():  # users ask for each module once, sharding does not
            yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if recurse or stored_values(self) is None:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter; what stands on a layer that is split among processes goes along.

        Raises:
            MisconfigurationException: The layer is split among others than those who share it for Lightning.
        """
        super().register_parameter(name, param)
        if is_shard(param):
            if not is_split(param):
                raise MisconfigurationException(
                    f"A {type(self).plain_class.__name__} that methods act on is split on a mesh other than that of the "
                    'strategy. Give parallelize_module self.device_mesh["tensor_parallel"].'
                )
            for beside in (*(entry for _, entry in self._named_maps("")), *(self.part_stack or ())):
                replicate(beside, param)

    def _shown(self) -> Iterator[tuple[str, nn.Module]]:
        """What is shown to sharding alone."""
        if (stored := stored_values(self)) is not None:
            yield "stored", stored
            yield "layer_parts", self.layer_parts
            yield "parametrizations", nn.ModuleList(entry for _, entry in self._named_maps(""))

    def train(self, mode: bool = True) -> Any:
        for part in self.part_stack or ():
            part.train(mode)
        return super().train(mode)

    @property
    def parametrizations(self) -> nn.Module:
        """The maps as modules, where ``functional_call`` and ``get_submodule`` look for them by name; a user's own go first."""
        own = self._modules.get("parametrizations")
        if own is not None:
            return own
        view = nn.Module()
        for name, chain in self.weight_maps.items():
            view.add_module(name, nn.ModuleList(chain.maps))
        return view

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MappedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for chain in self.weight_maps.values():
            for weight_map in chain.maps:
                weight_map._apply(fn)
        if self.part_stack is not None:
            self.part_stack.beneath = {name: fn(tensor) for name, tensor in self.part_stack.beneath.items()}
        for part in self.part_stack or ():
            part._apply(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own: OrderedDict[str, Any] = OrderedDict()
        super()._save_to_state_dict(own, prefix, keep_vars)
        if self.part_stack is not None:
            own.update({f"{prefix}{name}": tensor for name, tensor in self.part_stack.beneath.items()})
        stored = {f"{prefix}{name}": stored_key(f"{prefix}{name}") for name in self.weight_maps}
        destination.update({stored.get(key, key): value for key, value in own.items()})
        for start, weight_map in self._named_maps(prefix):
            weight_map.state_dict(destination=destination, prefix=start, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = {f"{prefix}{name}": stored_key(f"{prefix}{name}") for name in self.weight_maps}
        mine = tuple(map(maps_prefix, stored))
        if self.part_stack is not None:
            self.part_stack.take_out(self)
        own = {key: value for key, value in state_dict.items() if key not in stored and not key.startswith(mine)}
        own |= {name: state_dict[key] for name, key in stored.items() if key in state_dict}
        entered = self._enter(state_dict, prefix, own, error_msgs)
        missing: list[str] = []
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(stored.get(key, key) for key in missing)
        known = set(stored.values())
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        for start, weight_map in self._named_maps(prefix):
            state = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
            known.update(start + key for key in state)
            try:
                result = weight_map.load_state_dict(state, strict=False, assign=assign)
            except RuntimeError as error:
                error_msgs.append(f"{start.removesuffix('.')}: {error}")
                continue
            if not start.startswith(entered):
                missing_keys.extend(start + key for key in result.missing_keys)
            unexpected_keys.extend(start + key for key in result.unexpected_keys)
        if strict:
            both = (key for key, name in stored.items() if key in state_dict and name in state_dict)
            others = (*both, *(key for key in state_dict if key.startswith(mine) and key not in known))
            unexpected_keys.extend(others)

    def _enter(self, given: dict[str, Any], prefix: str, own: dict[str, Any], errors: list[str]) -> tuple[str, ...]:
        """Put the weights of an ordinary module among the values to load; return what the keys of their maps begin with.

        They are loaded by code that knows of no maps, such as a ``load_state_dict`` in the user's ``on_train_start``.
        """
        entered = []
        for name, chain in self.weight_maps.items():
            key = f"{prefix}{name}"
            if key in given and stored_key(key) not in given:
                try:
                    own[key] = chain.enter(given[key])
                except (ValueError, RuntimeError) as error:
                    errors.append(f"{key} is under weight maps, and {error}")
                entered.append(maps_prefix(key))
        return tuple(entered)

    def _named_maps(self, prefix: str) -> Iterator[tuple[str, WeightMap]]:
        """Every map with what its state-dict keys begin with."""
        for name, chain in self.weight_maps.items():
            for position, weight_map in enumerate(chain.maps):
                yield map_prefix(f"{prefix}{name}", position), weight_map

    def _named_parts(self, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        """Every part with what the names of its parameters begin with."""
        return ((f"{prefix}layer_parts.{part.key}.", part) for part in self.part_stack or ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            return inherited(memo)
        reduced: Any = super().__reduce_ex__(4)
        make, arguments, state = reduced[:3]
        twin = make(*arguments)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(state, memo))
        _COPIES[twin] = weakref.ref(self)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the ordinary layer that baking would leave."""
        return _baked_twin(self).__reduce_ex__(1)  # later protocols insist on the class of the object at hand


_COPIES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""Layers that were copied with their maps, to the layer they are a copy of."""


def copied_layers() -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Yield every copy that still has its maps, with the layer it is a copy of."""
    return ((twin, source()) for twin, source in list(_COPIES.items()) if isinstance(twin, MappedLayer))


def is_mapped(module: nn.Module, attribute: str | None = None) -> bool:
    """Whether a module's own parameters, or the one of that name, are under weight maps."""
    return isinstance(module, MappedLayer) and (attribute is None or attribute in module.weight_maps)


def stored_key(name: str) -> str:
    """Return the state-dict key of the stored value of a parameter under maps.

    Example:
        >>> stored_key("model.fc.weight")
        'model.fc.parametrizations.weight.original'
    """
    return f"{maps_prefix(name)}original"


def maps_prefix(name: str) -> str:
    """Return what all state-dict keys of a parameter under maps begin with.

    Example:
        >>> maps_prefix("model.fc.weight")
        'model.fc.parametrizations.weight.'
    """
    path, dot, attribute = name.rpartition(".")
    return f"{path}{dot}parametrizations.{attribute}."


def map_prefix(name: str, position: int) -> str:
    """Return what the state-dict keys of the map at a position on a parameter begin with.

    Example:
        >>> map_prefix("model.fc.weight", 0)
        'model.fc.parametrizations.weight.0.'
    """
    return f"{maps_prefix(name)}{position}."


def chain_on(layer: nn.Module, attribute: str) -> MapChain:
    """Return the chain of maps on a layer's own parameter, an empty new one where there is none."""
    chains, stack = _held(layer)
    if attribute not in chains:
        chains[attribute] = MapChain()
        _stand_in(layer, chains, stack)
    return chains[attribute]


def take_chain(layer: nn.Module, attribute: str) -> MapChain:
    """Take the chain of maps off a layer's own parameter, and give the layer its class back when nothing else is left."""
    chains, stack = _held(layer)
    chain = chains.pop(attribute)
    _stand_in(layer, chains, stack)
    return chain


def stack_on(layer: nn.Module) -> PartStack:
    """Return the parts beside a layer, an empty new stack where there are none."""
    chains, stack = _held(layer)
    if stack is None:
        stack = PartStack()
        _stand_in(layer, chains, stack)
    return stack


def take_stack(layer: nn.Module) -> None:
    """Take the parts off a layer, and give it its class back when no map is left either."""
    _stand_in(layer, _held(layer)[0], None)


def _held(layer: nn.Module) -> tuple[dict[str, MapChain], PartStack | None]:
    return (dict(layer.weight_maps), layer.part_stack) if isinstance(layer, MappedLayer) else ({}, None)


def _stand_in(layer: Any, chains: dict[str, MapChain], stack: PartStack | None) -> None:
    cls = _without_additions(type(layer)) if isinstance(layer, MappedLayer) else type(layer)
    for key in _HELD:
        vars(layer).pop(key, None)
    layer.__class__ = cls
    if chains or stack is not None:
        vars(layer)["weight_maps"] = chains
        if stack is not None:
            vars(layer)["part_stack"] = stack
        layer.__class__ = _mapped_class(cls, tuple(chains), stack is not None)


def _without_additions(cls: Any) -> type:
    """The class without what :class:`MappedLayer` adds, and with what ``fully_shard`` has put over it since."""
    if "plain_class" in vars(cls):
        plain: type = cls.plain_class
        return plain
    if cls not in _WRAPPED:
        bases = tuple(_without_additions(base) if issubclass(base, MappedLayer) else base for base in cls.__bases__)
        _WRAPPED[cls] = type(cls.__name__.replace("Mapped", "", 1), bases, dict(vars(cls)))
    return _WRAPPED[cls]


_WRAPPED: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
"""Classes that others derived from those of layers under maps, with what is left of them without maps."""


_HELD = ("weight_maps", "part_stack")

_CLASSES: weakref.WeakValueDictionary[tuple[type, tuple[str, ...], bool], type] = weakref.WeakValueDictionary()
"""One class for all layers of a kind, so that a compiled step is compiled once for them."""


def _mapped_class(cls: type[nn.Module], attributes: tuple[str, ...], parts: bool) -> type:
    found = _CLASSES.get((cls, attributes, parts))
    if found is None:
        names: dict[str, Any] = {"__module__": cls.__module__, "plain_class": cls}
        names |= {name: _reader(name) for name in attributes}
        if hasattr(cls, "reset_parameters"):
            names["reset_parameters"] = _reset_parameters
        if parts:
            names["forward"] = _forward(cls)
        found = type(f"Mapped{cls.__name__}", (MappedLayer, cls), names)
        _CLASSES[cls, attributes, parts] = found
    return found


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    own = cls.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.part_stack.call(own, self, args, kwargs)

    return forward


def _reader(name: str) -> property:
    def read(self: MappedLayer) -> Tensor:
        if is_shown():
            return self._parameters[name]  # type: ignore[return-value]
        try:
            return self.weight_maps[name](self._parameters[name])  # type: ignore[arg-type]
        except AttributeError as error:
            # A module answers one of its own by looking for a parameter of that name: the stored value, without the maps.
            raise RuntimeError(f"A weight map on {name!r} failed: {error}") from error

    return property(read)


@torch.no_grad()
def _reset_parameters(layer: Any, *args: Any, **kwargs: Any) -> None:
    """Initialise a layer anew as its own class does: that writes into the weight it reads, which here is a passing result."""
    mapped = type(layer)
    layer.__class__ = mapped.plain_class
    try:
        layer.reset_parameters(*args, **kwargs)
    finally:
        layer.__class__ = mapped
    for name, chain in layer.weight_maps.items():
        stored = layer._parameters[name]
        stored.copy_(chain.enter(stored))


def final_value(layer: nn.Module, name: str) -> Tensor:
    """Return the value a parameter has in an ordinary layer that computes the same: maps applied, parts merged; no graph."""
    stored: Any = layer._parameters[name]
    value: Tensor = stored.detach()
    if isinstance(layer, MappedLayer):
        if name in layer.weight_maps:
            value = layer.weight_maps[name].bake(stored)
        if layer.part_stack is not None and name in layer.part_stack.into(layer):
            value = layer.part_stack.merged(name, value)
    return value


_TWINS: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""Baked parameters that a pickler still holds, by the stored one: what layers share they share in the file too."""


def _baked_twin(layer: MappedLayer) -> nn.Module:
    cls = type(layer).plain_class
    twin = cls.__new__(cls)
    state = {key: value for key, value in vars(layer).items() if key not in _HELD}
    if layer.part_stack is not None:
        state["_forward_pre_hooks"] = layer.part_stack.without_marks(layer)
    state["_parameters"] = parameters = copy.copy(layer._parameters)
    merging = [] if layer.part_stack is None else layer.part_stack.into(layer)
    for name in dict.fromkeys([*layer.weight_maps, *merging]):
        stored: Any = parameters[name]
        value = final_value(layer, name)
        known = _TWINS.get(id(stored))
        if known is None or not torch.equal(known, value):
            known = _TWINS[id(stored)] = nn.Parameter(value.clone(), requires_grad=stored.requires_grad)
        parameters[name] = known
    vars(twin).update(state)
    return twin

"""Which channels must leave together: Torch-Pruning's dependency graph, read as groups of units."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.network.layers import is_linear, own_parameters
from lightning_peft.structure.coupled.closure import Closure, Reached
from lightning_peft.structure.coupled.example import leaves
from lightning_peft.structure.coupled.network_copy import NetworkCopy
from lightning_peft.structure.coupled.pieces import map_pieces
from lightning_peft.structure.coupled.units import Coupled, UnitCount, UnitPlace
from lightning_peft.weights.maps import plain_tensors, split_name

_Item: TypeAlias = tuple[Closure, Reached]
RETURNED = "they are what the network returns"
HEADS = "they are attention heads"
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def torch_pruning() -> ModuleType:
    """Import Torch-Pruning.

    Raises:
        MisconfigurationException: It is not installed.
    """
    try:
        import torch_pruning as found
    except ImportError as error:
        raise MisconfigurationException(
            "Which channels belong together is found out with Torch-Pruning, which is not installed. Install it with: pip "
            "install lightning-peft[prune]"
        ) from error
    return found  # type: ignore[no-any-return]


class InseparableError(Exception):
    """Why the channels of a group cannot be told apart, or stand alone."""


def channel_groups(
    twin: NetworkCopy, attended: Collection[str] = (), excused: Collection[str] = ()
) -> tuple[list[Coupled], dict[str, str]]:
    """Find the groups of channels that belong together, and so can be cut or ordered together.

    Args:
        twin: The network.
        attended: Places of attention heads, ``"layer:out"`` and ``"layer:in"``; channels that run through them stay.
        excused: Layers that need not take part in a call.

    Returns:
        The groups, in the order of the network, and why other layers' outputs stay, by name.

    Raises:
        MisconfigurationException: Torch-Pruning is missing, cannot trace the network, or did not reach one of its layers.
    """
    tp = torch_pruning()
    graph = tp.DependencyGraph()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parameters it takes for channels of their last dimension, as we do
            graph.build_dependency(
                twin.module,
                {},
                forward_fn=lambda network, _: _computed(twin.call()),
                customized_pruners=_transposed(tp, twin.module),
                verbose=False,
            )
    except ArithmeticError:
        _map_one_by_one(tp, graph)
    except Exception as error:
        raise MisconfigurationException(
            f"Torch-Pruning cannot trace {twin.name}: {type(error).__name__}: {error}. Name a part of the module with "
            'network="<name>".'
        ) from error
    map_pieces(tp, graph)
    reader = _Reader(tp, graph, twin, attended)
    reader.check_reached(excused)
    groups, whole = [], {}
    for name, closure in reader.closures():
        try:
            groups.append(reader.read(name, closure))
        except InseparableError as reason:
            whole[name] = str(reason)
        except OverflowError:
            whole[name] = "the graph loses track of which channel is which on their way to the next layer"
    place = {name: order for order, name in enumerate(reader.names.values())}
    return sorted(groups, key=lambda group: place[group.name]), whole


def _computed(output: Any) -> list[Tensor]:
    """The tensors that a network computed; beside them a cache of keys and values is one that Torch-Pruning cannot open."""
    return [value for value in leaves(output) if isinstance(value, Tensor) and value.grad_fn is not None]


class _Reader:
    """Reads Torch-Pruning's groups.

    Args:
        tp: The package.
        graph: Its graph of the twin.
        twin: The twin.
        attended: See :func:`channel_groups`.
    """

    def __init__(self, tp: ModuleType, graph: Any, twin: NetworkCopy, attended: Collection[str]) -> None:
        self.tp, self.graph, self.attended = tp, graph, attended
        self.names: dict[Any, str] = {module: name for name, module in twin.module.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in twin.module.named_parameters()}
        self.aliases: dict[int, list[str]] = {}
        for name, parameter in twin.module.named_parameters(remove_duplicate=False):
            self.aliases.setdefault(id(parameter), []).append(name)
        self.twin, self.network = twin, twin.module

    def check_reached(self, excused: Collection[str]) -> None:
        """Refuse layers that took no part in the call, because nothing can say what feeds them.

        Layers that took part unknown to the graph (an attention of one operator, a transposed linear layer) are none of them:
        what happens around them is proven with the cut.

        Raises:
            MisconfigurationException: There are some.
        """
        used = self._used()
        missed = [
            name
            for module, name in self.names.items()
            if own_parameters(module) and module not in self.graph.module2node and name not in excused
            if all(id(parameter) not in used and parameter.numel() > 1 for parameter in own_parameters(module).values())
        ]
        if missed:
            raise MisconfigurationException(
                f"{', '.join(missed[:5])}{' ...' if len(missed) > 5 else ''} did not contribute to the output of the network, "
                "so their inputs are unknown. Name a part of the module that always runs as a whole with "
                f'network="<name>". If nothing inside the network feeds them, say so with exclude={missed[:5]}.'
            )

    def _used(self) -> set[int]:
        """Parameters that the output depends on."""
        with torch.enable_grad():
            found = [value.grad_fn for value in leaves(self.twin.call()) if isinstance(value, Tensor)]
        used: set[int] = set()
        seen: set[Any] = set()
        while found:
            step = found.pop()
            if step is None or step in seen:
                continue
            seen.add(step)
            if hasattr(step, "variable"):
                used.add(id(step.variable))
            found += [parent for parent, _ in step.next_functions]
        return used

    def closures(self) -> Iterator[tuple[str, Closure | None]]:
        """Follow the outputs of every layer that no other layer's outputs led to, by the layer's name."""
        self._sever_attention()
        largest = max((size for tensor in self.network.parameters() for size in tensor.shape), default=0)
        seen: set[int] = set()
        for layer, node in list(self.graph.module2node.items()):
            if not (isinstance(layer, nn.modules.conv._ConvNd) or is_linear(layer)) or id(layer) in seen:
                continue
            cutter = self.graph.get_pruner_of_module(layer)
            try:
                closure = Closure(node, cutter.prune_out_channels, cutter.get_out_channels(layer), largest)
            except OverflowError:
                yield self.names[layer], None
                continue
            seen |= {id(place.node.module) for place in closure if self.graph.is_out_channel_pruning_fn(place.handler)}
            yield self.names[layer], closure

    def _sever_attention(self) -> None:
        """Let no path lead into an attention, whose heads are known without the graph."""
        for layer, node in self.graph.module2node.items():
            for end, beyond in (("out", node.outputs), ("in", node.inputs)):
                if f"{self.names.get(layer) if isinstance(layer, nn.Module) else None}:{end}" in self.attended:
                    node.dependencies = [d for d in node.dependencies if not any(d.target is other for other in beyond)]

    def read(self, name: str, closure: Closure | None) -> Coupled:
        """Turn what depends on the outputs of a layer into a group.

        Raises:
            InseparableError: It holds something that cannot be taken unit by unit.
            OverflowError: The graph's indices do not fit.
        """
        if closure is None:
            raise OverflowError
        places: list[UnitPlace] = []
        numbers: list[UnitCount] = []
        for place in closure:
            node, outputs = place.node, self.graph.is_out_channel_pruning_fn(place.handler)
            if node.type == self.tp.ops.OPTYPE.OUTPUT or (outputs and not node.outputs):
                raise InseparableError(RETURNED)
            module = node.module
            if isinstance(module, nn.Parameter):
                more = self._parameter(module, int(node.pruning_dim), (closure, place))
            elif module in self.names:
                more = self._layer(module, outputs, (closure, place))
            else:
                continue  # an operation
            places += more[0]
            numbers += more[1]
        self._check_ties(places)
        count = int(closure.units.max()) + 1
        if count < 2:
            raise InseparableError("they depend on one another")
        return Coupled(name, "channels", count, _merged(places), _counted(numbers))

    def _parameter(self, parameter: nn.Parameter, dim: int, item: _Item) -> tuple[list[UnitPlace], list[UnitCount]]:
        name = self.parameters[id(parameter)]
        path, _ = split_name(name)
        dim %= parameter.ndim
        units = _units(parameter.shape[dim], item)
        noted = vars(self.network.get_submodule(path)).get("normalized_shape")
        shaped = isinstance(noted, tuple) and noted[-1] == len(units)
        return [UnitPlace(name, dim, units)], [UnitCount(path, "normalized_shape", units)] if shaped else []

    def _layer(self, layer: Any, outputs: bool, item: _Item) -> tuple[list[UnitPlace], list[UnitCount]]:
        name = self.names[layer]
        if f"{name}:{'out' if outputs else 'in'}" in self.attended:
            raise InseparableError(HEADS)
        if isinstance(layer, nn.modules.conv._ConvNd):
            return self._conv(name, layer, outputs, item)
        if isinstance(layer, nn.Linear):
            units = _units(layer.out_features if outputs else layer.in_features, item)
            return _weighted(name, layer, 0 if outputs else 1, outputs, ["out_features" if outputs else "in_features"], units)
        if is_linear(layer):
            units = _units(layer.nf if outputs else layer.nx, item)
            return _weighted(name, layer, int(outputs), outputs, ["nf" if outputs else "nx"], units)
        if isinstance(layer, nn.Embedding):
            units = _units(layer.embedding_dim, item)
            return [UnitPlace(f"{name}.weight", 1, units)], [UnitCount(name, "embedding_dim", units)]
        if isinstance(layer, _BATCH_NORMS):
            return self._norm(name, layer, "num_features", layer.num_features, item)
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
            return self._norm(name, layer, "normalized_shape", layer.normalized_shape[0], item)
        if isinstance(layer, nn.GroupNorm) and layer.num_groups == 1:
            return self._norm(name, layer, "num_channels", layer.num_channels, item)
        if isinstance(layer, nn.PReLU):
            units = _units(layer.num_parameters, item)
            one = layer.num_parameters == 1
            return ([], []) if one else ([UnitPlace(f"{name}.weight", 0, units)], [UnitCount(name, "num_parameters", units)])
        raise InseparableError(f"{name} is a {type(layer).__name__}, whose channels cannot be removed one by one")

    def _conv(self, name: str, layer: Any, outputs: bool, item: _Item) -> tuple[list[UnitPlace], list[UnitCount]]:
        if layer.groups > 1:
            if not layer.groups == layer.in_channels == layer.out_channels:
                raise InseparableError(f"{name} is a convolution in {layer.groups} groups, which must stay of one size")
            units = _units(layer.out_channels, item)
            return _weighted(name, layer, 0, True, ["out_channels", "in_channels", "groups"], units)
        units = _units(layer.out_channels if outputs else layer.in_channels, item)
        dim = int(outputs == layer.transposed)
        return _weighted(name, layer, dim, outputs, ["out_channels" if outputs else "in_channels"], units)

    def _norm(self, name: str, layer: Any, attribute: str, size: int, item: _Item) -> tuple[list[UnitPlace], list[UnitCount]]:
        units = _units(size, item)
        tensors = {"weight": True, "bias": False, "running_mean": False, "running_var": False}
        found = [(key, scored) for key, scored in tensors.items() if getattr(layer, key, None) is not None]
        return [UnitPlace(f"{name}.{key}", 0, units, scored) for key, scored in found], [UnitCount(name, attribute, units)]

    def _check_ties(self, places: list[UnitPlace]) -> None:
        """Refuse tied tensors that are not cut alike wherever they are used."""
        held = {(place.tensor, place.dim): place.units for place in places}
        for (tensor, dim), units in held.items():
            parameter = dict(self.network.named_parameters(remove_duplicate=False)).get(tensor)
            for alias in self.aliases.get(id(parameter), [tensor]):
                same = self.network.get_submodule(split_name(alias)[0]) is self.network.get_submodule(split_name(tensor)[0])
                if not same and ((alias, dim) not in held or not torch.equal(held[alias, dim], units)):
                    raise InseparableError(f"{tensor} is tied to {alias}, which does not lose the same channels")


def _weighted(
    name: str, layer: Any, dim: int, outputs: bool, attributes: list[str], units: Tensor
) -> tuple[list[UnitPlace], list[UnitCount]]:
    places = [UnitPlace(f"{name}.weight", dim, units, scored=True, written=outputs)]
    if outputs and layer.bias is not None:
        places.append(UnitPlace(f"{name}.bias", 0, units))
    return places, [UnitCount(name, attribute, units) for attribute in attributes]


def _units(size: int, item: _Item) -> Tensor:
    """Unit of every coordinate of a dimension."""
    closure, place = item
    return closure.units_of(place, size)


def _counted(numbers: list[UnitCount]) -> list[UnitCount]:
    """Each number once."""
    return list({(number.path, number.attribute): number for number in numbers}.values())


def _merged(places: list[UnitPlace]) -> list[UnitPlace]:
    """Each dimension of each tensor once: a layer norm or depthwise convolution is met as writer and as reader."""
    found: dict[tuple[str, int], UnitPlace] = {}
    for place in places:
        first = found.setdefault((place.tensor, place.dim), place)
        if not torch.equal(first.units, place.units):
            raise InseparableError(f"channels of {place.tensor} depend on one another")
    return list(found.values())


def layers_of(groups: Iterable[Coupled]) -> set[str]:
    """``"layer:out"`` and ``"layer:in"`` for the layers of groups of heads."""
    places = (place for group in groups for place in group.places if place.scored)
    return {f"{split_name(place.tensor)[0]}:{'out' if place.written else 'in'}" for place in places}


def tied_outside(module: nn.Module, path: str, group: Coupled) -> str | None:
    """Say which layer outside the network shares a tensor of a group of it; ``None`` when none does.

    Args:
        module: The module that holds the network.
        path: Qualified name of the network in it.
        group: The group, by names in the network.
    """
    tensors = plain_tensors(module)
    prefix = f"{path}." if path else ""
    shared = {id(tensors[prefix + place.tensor]): prefix + place.tensor for place in group.places}
    for name, tensor in tensors.items():
        if not prefix or name.startswith(prefix) or id(tensor) not in shared:
            continue
        owners = (module.get_submodule(split_name(other)[0]) for other in (name, shared[id(tensor)]))
        if len({id(owner) for owner in owners}) > 1:
            return f"{shared[id(tensor)]} is tied to {name}, outside of the network"
    return None


def _map_one_by_one(tp: ModuleType, graph: Any) -> None:
    """Map the indices of a traced graph without the operations whose sizes Torch-Pruning divides by zero for.

    It gives up at the first of them. What runs through it is then found to be mapped wrongly when the cuts are proven.
    """
    nodes = graph.module2node
    for module, node in nodes.items():
        graph.module2node = {module: node}
        with contextlib.suppress(ArithmeticError):
            tp.dependency.index_mapping.update_index_mapping(graph)
    graph.module2node = nodes


def _transposed(tp: ModuleType, network: nn.Module) -> dict[type[nn.Module], Any]:
    """A handler for linear layers with a transposed weight (``Conv1D`` of transformers), by class."""

    class Transposed(tp.pruner.function.LinearPruner):  # type: ignore[name-defined,misc]
        def get_out_channels(self, layer: Any) -> int:
            return int(layer.nf)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.nx)

    found = {type(layer) for layer in network.modules() if is_linear(layer) and not isinstance(layer, nn.Linear)}
    return {kind: Transposed() for kind in found}

"""Parts on a module: put beside layers, found again by name, taken off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.network.layers import own_parameters
from lightning_peft.weights.layer_part import LayerPart
from lightning_peft.weights.map_modules import MapModules
from lightning_peft.weights.mapped_layer import MappedLayer, stack_on, take_stack
from lightning_peft.weights.part_stack import PartStack
from lightning_peft.weights.weight_map import WeightMap

PartT = TypeVar("PartT", bound=LayerPart)


@dataclass(slots=True)
class PlacedPart:
    """A part where it stands: the plain qualified name of its layer, the layer, and the part."""

    path: str
    layer: nn.Module
    part: LayerPart

    @property
    def name(self) -> str:
        """Qualified name of the part, which the names of its parameters begin with."""
        return f"{self.path}.layer_parts.{self.part.key}" if self.path else f"layer_parts.{self.part.key}"

    @property
    def sibling(self) -> nn.Parameter | None:
        """The parameter beside which the part's own are trained: the layer's weight, or its first; ``None`` without one."""
        own = own_parameters(self.layer)
        found: nn.Parameter | None = own.get("weight", next(iter([*own.values(), *self.layer.parameters()]), None))  # type: ignore[assignment]
        return found


def placed_parts(module: nn.Module, *, every_name: bool = False) -> Iterator[PlacedPart]:
    """Yield every part on a module, in module order and from the innermost on.

    Args:
        module: The module.
        every_name: Yield the parts of a layer that stands in several places under each of its names.
    """
    for path, layer, stack in part_stacks(module, every_name=every_name):
        yield from (PlacedPart(path, layer, part) for part in stack)


def part_stacks(module: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module, PartStack]]:
    """Yield every layer with parts, under its plain qualified name; see :func:`placed_parts`."""
    for path, layer in module.named_modules(remove_duplicate=not every_name):
        if isinstance(layer, MappedLayer) and layer.part_stack is not None:
            yield path, layer, layer.part_stack


def part_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of every part, by qualified name."""
    return {
        f"{placed.name}.{key}": tensor
        for placed in placed_parts(module)
        for key, tensor in placed.part.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not key.endswith("_extra_state")
    }


def recorded_parts(module: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, list[LayerPart]]]:
    """Yield the parts of every layer that checkpoints tell of; see :func:`placed_parts`."""
    for path, _, stack in part_stacks(module, every_name=every_name):
        if stack.recorded:
            yield path, stack.recorded


def put_part(module: nn.Module, path: str, part: PartT) -> PartT:
    """Put a part beside the layer called ``path``; one of the same method and kind that stands there already stays instead.

    Args:
        module: Module in which ``path`` is looked up.
        path: Qualified name of a layer or of any other submodule, for instance ``"model.fc1"``.
        part: The part.

    Returns:
        The part that stands there.

    Raises:
        MisconfigurationException: Calls of the layer do not reach its parts, or the part cannot go into its weight.
    """
    layer = module.get_submodule(path)
    stack = layer.part_stack if isinstance(layer, MappedLayer) else None
    present = next((entry for entry in stack or () if entry.key == part.key), None)
    if present is not None:
        return present  # type: ignore[return-value]
    if stack is not None and stack.beneath:
        raise MisconfigurationException(
            f"The parts on {path} are merged into its weight, where no other can join them. Call "
            "lightning_peft.unmerge(module) first."
        )
    _check_called(module, path, layer, part)
    if part.merges:
        _check_weight(path, layer, part)
    stack = stack_on(layer)
    stack.insert(part)
    part.train(layer.training)
    if _in_fused_layer(module, path):
        stack.mark(layer)
    stack.version = stack.count(layer)
    MapModules.show(module)
    return part


def _check_called(module: nn.Module, path: str, layer: nn.Module, part: LayerPart) -> None:
    """Refuse layers whose calls no part would notice."""
    parent = module.get_submodule(path.rpartition(".")[0]) if path else None
    if isinstance(parent, nn.MultiheadAttention):
        raise MisconfigurationException(
            f"{path} is part of an nn.MultiheadAttention, which reads its weight and never calls it, so the part {part.kind!r} "
            f"of {part.owner} would do nothing there. Leave it out with exclude=[{path!r}]; a method's author can put a "
            f"WeightMap on {path}.weight instead, or the part on {path.rpartition('.')[0]}."
        )
    if "forward" in vars(layer):
        raise MisconfigurationException(
            f"The forward of {path} ({type(layer).__name__}) was replaced on the object, so its calls would bypass the part "
            f"{part.kind!r} of {part.owner}. Replace it after the methods are attached, define it in a subclass, or pass "
            f"exclude=[{path!r}]."
        )


def _check_weight(path: str, layer: nn.Module, part: LayerPart) -> None:
    if layer._parameters.get("weight") is None:
        raise MisconfigurationException(
            f"The part {part.kind!r} of {part.owner} is merged into the weight of its layer, but {path} "
            f"({type(layer).__name__}) has no parameter 'weight' of its own. Leave it out with exclude=[{path!r}]."
        )
    chain = layer.weight_maps.get("weight") if isinstance(layer, MappedLayer) else None
    for weight_map in chain.maps if chain is not None else ():
        check_masks(path, part, weight_map)


def check_masks(path: str, part: LayerPart, weight_map: WeightMap) -> None:
    """Refuse a part that would fill in, when it goes into the weight, what a mask has set to zero.

    Raises:
        MisconfigurationException: The map is a mask, and the part would.
    """
    if weight_map.lane >= Lane.MASK and part.merges and part.lane < Lane.MASK and not part.keeps_zeros:
        raise MisconfigurationException(
            f"{path}.weight is under the mask {weight_map.kind!r} of {weight_map.owner}, and the part {part.kind!r} of "
            f"{part.owner} would fill in its zeros when it is merged into the weight. Leave the layer out of one of the two "
            f"with exclude=[{path!r}]."
        )


def _in_fused_layer(module: nn.Module, path: str) -> bool:
    names = path.split(".") if path else []
    owners = (module.get_submodule(".".join(names[:depth])) for depth in range(len(names)))
    return any(isinstance(owner, nn.TransformerEncoderLayer) for owner in owners)


def take_parts(layer: nn.Module, stack: PartStack, parts: Iterable[LayerPart]) -> None:
    """Take parts off a layer; its weight stays as it is."""
    leaving = set(parts)
    for part in leaving:
        part.detached()
    if staying := [part for part in stack if part not in leaving]:
        stack.parts = staying
    else:  # the stack stays as it was, for whoever took a snapshot of the layer
        stack.unmark(layer)
        take_stack(layer)

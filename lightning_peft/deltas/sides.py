"""Where deltas stand: for every tensor the side of its layer, and why it is the weight where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.compose.lanes import Lane
from lightning_peft.contract import Contract, methods_of
from lightning_peft.deltas.delta_part import CONVS
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.layout import Layout, layout_of
from lightning_peft.network.layers import has_class, is_linear, own_parameters, public_class
from lightning_peft.network.plain_class import plain_class
from lightning_peft.network.targets import tied_names
from lightning_peft.weights.mapped_layer import MappedLayer

_NOT_CALLED = "no layer is called with it"


@dataclass(frozen=True)
class Place:
    """A tensor that gets a delta.

    Attributes:
        path: Qualified name of the layer.
        layer: The layer.
        tensor: Qualified name of the tensor.
        layout: How it is read as a matrix.
        side: ``"activations"``, or ``"weight"``.
        reason: Why it is the weight.
    """

    path: str
    layer: nn.Module
    tensor: str
    layout: Layout
    side: Literal["activations", "weight"]
    reason: str = ""

    @property
    def called(self) -> bool:
        """Whether the layer is called with the tensor, so that its inputs can be seen."""
        return self.reason != _NOT_CALLED

    @property
    def stored(self) -> nn.Parameter:
        """The frozen tensor, which layers may share."""
        value: nn.Parameter = self.layer._parameters[self.tensor.rpartition(".")[2]]  # type: ignore[assignment]
        return value

    @property
    def seen(self) -> Tensor:
        """The tensor as maps below the delta make it."""
        value: Tensor = getattr(self.layer, self.tensor.rpartition(".")[2])
        return value


def places(method: Contract, module: nn.Module, form: type[Form]) -> list[Place]:
    """Return the tensors of a method's targets, for deltas of a form.

    Raises:
        MisconfigurationException: A target has no matrix of its own, or one that no delta can stand on.
    """
    mapped, found = _mapped_by_others(method, module), []
    tied = tied_names(module)
    aliases = {name: first for first, names in tied.items() for name in names}
    for path, layer in method.select(module).items():
        for key, tensor in matrices(path, layer).items():
            name = f"{path}.{key}" if path else key
            if name in mapped:
                reason = "other methods map it"
            elif name in aliases:
                reason = f"{' and '.join(tied[aliases[name]])} are one tensor"
            else:
                reason = why_on_weight(module, path, layer, form, method.name, key)
            side: Literal["activations", "weight"] = "weight" if reason else "activations"
            found.append(Place(path, layer, name, layout_of(layer, tensor, key), side, reason))
    return found


def _mapped_by_others(method: Contract, module: nn.Module) -> set[str]:
    """Tensors that other methods of the run change, or that have maps on them already."""
    names = {
        f"{path}.{name}".removeprefix(".")
        for path, layer in module.named_modules()
        if isinstance(layer, MappedLayer)
        for name, chain in layer.weight_maps.items()
        if any(each.method != method.name for each in chain.maps)
    }
    if method.run is not None:
        for other in methods_of(method.run.trainer.callbacks):  # type: ignore[attr-defined]
            if other.weight_maps and other.lane != Lane.DELTA:  # two deltas on one tensor are a conflict, which the plan finds
                names.update(other.claims(module))
    return names


def matrices(path: str, layer: nn.Module) -> dict[str, Tensor]:
    """The matrices of a layer by the names of its parameters: its weight, or whatever else it holds.

    Args:
        path: Qualified name of the layer.
        layer: The layer.

    Raises:
        MisconfigurationException: It has none of its own, or one that is computed by somebody else or not of floating point.
    """
    own = own_parameters(layer)
    found = {key: tensor for key, tensor in own.items() if key == "weight" or ("weight" not in own and tensor.ndim in (2, 3))}
    if not found:
        inner = [f"{path}.{key}" for key, each in layer.named_modules() if key and (is_linear(each) or type(each) in CONVS)]
        raise MisconfigurationException(
            f"{path or 'The module'}, {public_class(layer)}, holds no matrix. "
            + (f"Name its layers: targets={inner[:3]!r}." if inner else "Name a layer in targets=.")
        )
    for key, tensor in found.items():
        if parametrize.is_parametrized(layer, key) or key not in layer._parameters:
            raise MisconfigurationException(
                f"{path}.{key} is computed by a parametrization or a hook of yours, such as weight_norm. Take that off first, "
                "for instance with torch.nn.utils.parametrize.remove_parametrizations, or leave the layer out: "
                f"exclude=[{path!r}]."
            )
        if tensor.is_meta or not tensor.is_floating_point():
            state = "on the meta device" if tensor.is_meta else f"of type {tensor.dtype}"
            raise MisconfigurationException(
                f"{path}.{key} is {state}, and a delta is made for weights of floating point. Load it first, or leave the "
                f"layer out: exclude=[{path!r}]."
            )
    return found


def why_on_weight(module: nn.Module, path: str, layer: Any, form: type[Form], name: str, key: str = "weight") -> str:
    """Say why calls of a layer cannot take a product in, so that it has to act on the weight; nothing where they can."""
    parent = module.get_submodule(path.rpartition(".")[0]) if path else None
    if key != "weight" or isinstance(parent, nn.MultiheadAttention):
        return _NOT_CALLED
    if form.beside == "none":
        return form.reason
    if form.beside == "linear" and (others := _others(layer, name)):
        return f"{others[0]} stands beside the layer, and {form.reason}"
    if plain_class(layer).forward is nn.Linear.forward:
        return ""
    if form.beside == "linear":
        return form.reason
    if isinstance(layer, nn.Embedding):
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return "" if plain else "its rows are looked up in a special way"
    if any(isinstance(layer, cls) for cls in CONVS):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and plain_class(layer) in CONVS
        return "" if plain else "its convolution has groups or padding of its own"
    return "" if has_class(layer, "Conv1D") else f"{public_class(layer)} computes in its own way"


def _others(layer: Any, name: str) -> list[str]:
    """Whose parts stand beside a layer already: what scales the rows of the weight would have to scale those too."""
    parts = layer.part_stack.parts if isinstance(layer, MappedLayer) and layer.part_stack is not None else []
    return [] if any(part.method == name for part in parts) else [part.owner for part in parts]

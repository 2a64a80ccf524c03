"""Plain layers described by their arguments, so that a checkpoint can say what an adapter stands beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.network.layers import has_class, public_class
from lightning_peft.network.plain_class import plain_class

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
}
_TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def described_layers(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what :func:`layer_shell` takes for each layer, as plain data.

    Raises:
        MisconfigurationException: A layer cannot be built from its arguments; all of these are named.

    Example:
        >>> described_layers({"fc": nn.Linear(4, 2)})["fc"]
        {'dtype': 'float32', 'bias': True, 'kind': 'Linear', 'arguments': {'in_features': 4, 'out_features': 2}}
    """
    found = {path: _described(layer) for path, layer in layers.items()}
    if odd := [path for path, description in found.items() if description is None]:
        known = ", ".join(each.__name__ for each in _ARGUMENTS)
        raise MisconfigurationException(
            f"{odd[0]} is a {public_class(layers[odd[0]])}, and a checkpoint can only rebuild an adapter beside one of {known} "
            f"and Conv1D, with numbers for the padding. Leave out exclude={odd!r}, beside what is left out now."
        )
    return {path: description for path, description in found.items() if description is not None}


def _described(layer: Any) -> dict[str, Any] | None:
    dtype = str(layer.weight.dtype).removeprefix("torch.") if getattr(layer, "weight", None) is not None else ""
    found: dict[str, Any] = {"dtype": dtype, "bias": getattr(layer, "bias", None) is not None}
    if has_class(layer, "Conv1D"):
        return {**found, "kind": "Conv1D", "arguments": {"nf": layer.nf, "nx": layer.nx}}
    cls = plain_class(layer)
    if cls not in _ARGUMENTS or dtype not in _TYPES or isinstance(getattr(layer, "padding", 0), str):
        return None
    given = {name: getattr(layer, name) for name in _ARGUMENTS[cls]}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return {**found, "kind": cls.__name__, "arguments": plain}


def layer_shell(description: Mapping[str, Any], weight: Tensor | None = None) -> nn.Module:
    """Build a described layer around a weight; without one around zeros, as its bias is.

    Raises:
        KeyError: There is no such type of numbers.
        ValueError: There is no such layer.
    """
    kind, arguments = description["kind"], {**description["arguments"]}
    with torch.device("meta"):
        if kind == "Conv1D":
            from transformers.pytorch_utils import Conv1D

            layer: Any = Conv1D(arguments["nf"], arguments["nx"])
        else:
            cls = next((each for each in _ARGUMENTS if each.__name__ == kind), None)
            if cls is None:
                raise ValueError(f"an adapter stands beside no layer {kind!r}")
            plain = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
            layer = cls(**plain, **({} if cls is nn.Embedding else {"bias": description["bias"]}))
    own = torch.zeros((), dtype=_TYPES[description["dtype"]]) if weight is None else weight.detach()
    for name, parameter in list(layer.named_parameters()):
        value = own if name == "weight" and weight is not None else own.new_zeros(parameter.shape)
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return layer  # type: ignore[no-any-return]

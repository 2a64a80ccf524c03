"""The tensors of a module by the names an ordinary one has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.network.plain_class import StandIn


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name they have without weight maps: what is stored, maps' own tensors left out.

    A tied tensor appears under each of its names.

    Example:
        >>> list(plain_tensors(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    tensors = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    for path, layer in module.named_modules(remove_duplicate=False):
        if not isinstance(layer, StandIn):
            continue
        start = f"{path}." if path else ""
        for name in layer.weight_maps:
            own = f"{start}parametrizations.{name}."
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(own)}
            tensors[f"{start}{name}"] = layer._parameters[name]  # type: ignore[assignment]
    return tensors


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor another value in place, wherever it was made: what inference mode made takes writes only there.

    A metric that was reset in an evaluation holds such tensors.
    """
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(value)

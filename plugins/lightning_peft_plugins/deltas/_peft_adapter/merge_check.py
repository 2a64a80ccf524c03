"""Whether PEFT's merge of an adapter gives back the layer that training saw, tried on a layer of its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft_plugins.deltas._peft_adapter.layer_shell import layer_shell
from lightning_peft_plugins.deltas._peft_adapter.tuner_part import TunerPart

_CLOSE = 1e-4  # of the largest output; single precision stays far below, and whatever else a merge changes is far above


@torch.no_grad()
def check_merge(config: Mapping[str, Any], path: str, description: Mapping[str, Any]) -> None:
    """Refuse an adapter that does not go into the weight of its layer.

    Args:
        config: The configuration, its targets found.
        path: Name of the layer in the network.
        description: The layer.

    Raises:
        MisconfigurationException: PEFT cannot merge it, or what it leaves computes something else.
    """
    description = {**description, "dtype": "float32"}  # half of it rounds too much to tell
    base = layer_shell(description)
    for tensor in base.parameters():
        tensor.normal_(std=1.0 if tensor.ndim == 1 else 0.1)
    kept = {name: tensor.clone() for name, tensor in base.named_parameters()}
    part = TunerPart(config, path, description, base)
    check_unchanged(path, base, kept["weight"], config)
    part.eval()
    for tensor in part.parameters():
        if tensor.requires_grad and tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
    inputs = _inputs(base)
    try:
        live = part.around(nn.Module.__call__.__get__(base), base, (inputs,), {})
        weight = part.merged(kept["weight"])
    except Exception as error:  # what a tuner cannot do it says in its own way
        raise MisconfigurationException(
            f"{_named(config)} cannot be merged into the weight of {path}: {error} {_CURE}"
        ) from error
    base.get_parameter("weight").copy_(weight)
    merged = base(inputs)
    error = float((live - merged).abs().max() / live.abs().max())
    if not error < _CLOSE:
        raise MisconfigurationException(
            f"{_named(config)} at {path} computes what no weight of a {description['kind']} does (the merged layer is off by "
            f"{error:.2g} of its largest output): it changes the bias too, or its inputs. {_CURE}"
        )


_CURE = (
    "Choose layers without a bias, or a tuner that only changes weights, for instance LORA, OFT, LOHA or ADALORA; with PEFT's "
    "own get_peft_model the adapter stays in the network."
)


def check_unchanged(path: str, base: Any, before: Tensor, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose initialisation changes the frozen weight.

    Raises:
        MisconfigurationException: It does.
    """
    if not torch.equal(base.weight.detach(), before):
        raise MisconfigurationException(
            f"{_named(config)} changes the weight of {path} when it is made, as PiSSA, OLoRA, CorDA, LoftQ and KaSA do, so "
            "files of what was trained would not fit the base any more. Set init_lora_weights=True and no kasa_config."
        )


def _named(config: Mapping[str, Any]) -> str:
    return f"PEFT's {config['peft_type']}"


def _inputs(layer: Any) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(min(layer.num_embeddings, 8)).unsqueeze(0)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = [(size - 1) * gap + 3 for size, gap in zip(layer.kernel_size, layer.dilation, strict=True)]
        return torch.randn(2, layer.in_channels, *sizes)
    return torch.randn(2, 3, layer.nx if hasattr(layer, "nx") else layer.in_features)

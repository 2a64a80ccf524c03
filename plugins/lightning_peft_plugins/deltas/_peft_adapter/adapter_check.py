"""Whether an adapter can be resumed and merged, tried with random numbers on a layer of its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft_plugins.deltas._peft_adapter.layer_shell import layer_shell
from lightning_peft_plugins.deltas._peft_adapter.tuner_part import TunerPart

_CLOSE = 1e-4  # of the largest output; single precision stays far below, and whatever else a merge changes is far above


def check_adapter(config: Mapping[str, Any], path: str, description: Mapping[str, Any]) -> None:
    """Refuse an adapter that does not go into the weight of its layer, or remembers what no file would hold.

    Args:
        config: The configuration, its targets found.
        path: Name of the layer in the network.
        description: The layer.

    Raises:
        MisconfigurationException: PEFT cannot merge it, what is left computes something else, or a call leaves something in it
            that is no tensor of its state.
    """
    description = {**description, "dtype": "float32"}  # half of it rounds too much to tell
    base = layer_shell(description)
    with torch.no_grad():
        for tensor in base.parameters():
            tensor.normal_(std=1.0 if tensor.ndim == 1 else 0.1)
    weight = base.get_parameter("weight").detach().clone()
    part, inputs = TunerPart(config, path, description, base), _inputs(base)
    check_unchanged(path, base, weight, config)
    try:
        live, merged = _both_ways(part, base, weight, inputs)
        left = _left_behind(part, base, inputs)
    except Exception as error:  # what a tuner cannot do it says in its own way
        raise MisconfigurationException(
            f"{_named(config)} cannot be merged into the weight of {path}: {error} {_CURE}"
        ) from error
    error = float((live - merged).abs().max() / live.abs().max())
    if not error < _CLOSE:
        raise MisconfigurationException(
            f"{_named(config)} at {path} computes what no weight of a {description['kind']} does (the merged layer is off by "
            f"{error:.2g} of its largest output): it changes the bias too, or its inputs. {_CURE}"
        )
    if left:
        raise MisconfigurationException(
            f"{_named(config)} remembers {left} from one step to the next outside of its tensors, so a resumed training "
            "would not go on as it was. Leave out the part of config that asks for it, such as velora_config."
        )


@torch.no_grad()
def _both_ways(part: TunerPart, base: nn.Module, weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer computes with a changed adapter beside it, and with that merged into its weight."""
    for tensor in part.parameters():
        if tensor.requires_grad and tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
    live = _call(part.eval(), base, inputs)
    base.get_parameter("weight").copy_(part.merged(weight))
    return live, base(inputs)


def _left_behind(part: TunerPart, base: nn.Module, inputs: Tensor) -> str:
    """Name what a step changes in an adapter that its state dict does not hold; nothing where there is none."""
    before = _held(part)
    _call(part.train(), base, inputs).sum().backward()
    after = _held(part)
    changed = (name for name in {**before, **after} if before.get(name) != after.get(name))
    return next(changed, "").partition(" ")[0]


def _held(part: TunerPart) -> dict[str, Any]:
    """What an adapter's modules hold beside their state dict: plain values and tensors in attributes, buffers not saved."""
    found: dict[str, Any] = {}
    for path, module in part.tuner.named_modules():
        own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
        own |= {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in own.items():
            for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(entry, Tensor):
                    found[f"{name} {path} {key}"] = (id(entry), entry._version)
                elif isinstance(entry, (bool, int, float, str)):
                    found[f"{name} {path} {key}"] = entry
    return found


def _call(part: TunerPart, base: nn.Module, inputs: Tensor) -> Tensor:
    answer: Tensor = part.around(nn.Module.__call__.__get__(base), base, (inputs,), {})
    return answer


_CURE = (
    "Choose layers without a bias (exclude= the others), or a tuner that only changes weights, for instance LORA, OFT, LOHA or "
    "ADALORA; with PEFT's own get_peft_model the adapter stays in the network."
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

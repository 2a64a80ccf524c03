"""What PEFT put beside layers, told by the names that its layers declare, without importing it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn


def adapter_parts(modules: Collection[nn.Module]) -> set[nn.Module]:
    """Every module inside of an adapter: ``lora_A`` and the like."""
    children = (module._modules.get(name) for module in modules for name in getattr(module, "adapter_layer_names", ()))
    return {part for child in children if child is not None for part in child.modules()}


def check_unadapted(method: str, module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse to mask a weight beside which an adapter stands: once that is merged into it, the pattern is gone.

    Args:
        method: Name of the method that masks.
        module: The module.
        layers: Layers that it would mask, by name.

    Raises:
        MisconfigurationException: One has an adapter; how to mask what comes out in the end is named.
    """
    adapted = (part for part in module.modules() if getattr(part, "adapter_layer_names", ()))
    bases = {getattr(part, "base_layer", None) for part in adapted if not getattr(part, "merged", False)}
    if found := [name for name, layer in layers.items() if layer in bases]:
        raise MisconfigurationException(
            f"{method} would mask {found[0]}, beside which stands an adapter: merged into the weight it fills what was pruned. "
            "Train the adapter first, merge it (network = network.merge_and_unload()) and prune then, or leave the layer out: "
            f"exclude=[{found[0]!r}]."
        )

"""The head of a network, as far as it can be trained without changing another layer."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lightning_peft.network.layers import own_parameters
from lightning_peft.network.tunable import tunable


def untied_heads(module: nn.Module) -> tuple[dict[nn.Parameter, str], list[str]]:
    """Find the parameters of the layers that write the logits.

    Args:
        module: The module.

    Returns:
        Each parameter with the name of its layer; and names of the layers that were left out, because they share a parameter
        with another layer, such as an embedding.

    Example:
        >>> table, head = nn.Embedding(3, 2), nn.Linear(2, 3)
        >>> head.weight = table.weight
        >>> untied_heads(nn.Sequential(table, head))
        ({}, ['1'])
    """
    holders = Counter(parameter for layer in module.modules() for parameter in own_parameters(layer).values())
    found = tunable(module, ("head",))
    tied = {layer for parameter, layer in found.items() if holders[parameter] > 1}
    return {parameter: layer for parameter, layer in found.items() if layer not in tied}, sorted(tied)


def described_heads(module: nn.Module) -> list[str]:
    """Say which heads are trained, and which are not, for a plan."""
    found, tied = untied_heads(module)
    parts = [f"the head ({', '.join(dict.fromkeys(found.values()))})"] if found else []
    return [*parts, *(f"the head ({name}) is tied to another layer and stays frozen" for name in tied)]

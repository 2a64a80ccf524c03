"""Values that official codes computed on tiny networks, each kept with the commit it came from.

Weights and inputs are sines of their places, so that no generator of random numbers has a say. The codes were run outside this
repository; nothing of them is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def values_of(name: str) -> dict[str, Any]:
    """What stands in a file of ``tests/fixtures``."""
    return json.loads((Path(__file__).parent / "fixtures" / f"{name}.json").read_text())


def filled(net, scale=0.9):
    """Fill a network with sines; norms are near the identity, and running statistics near those of nothing."""
    place = 0
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point():
            values = torch.sin(torch.arange(place, place + tensor.numel(), dtype=torch.float64) * 1.7 + 0.3)
            place += tensor.numel()
            if "running_var" in name or (tensor.ndim == 1 and name.endswith("weight")):
                values = 1 + values / 4
            elif tensor.ndim == 1:
                values = values / 5
            else:
                values = values * scale
            tensor.data = values.view(tensor.shape)
    return net.eval()


def marks(tensor):
    """Two sums that tell a tensor from others: plain, and weighted by waves over its places."""
    flat = tensor.flatten().double()
    return torch.stack([flat.sum(), (flat * torch.cos(torch.arange(len(flat), dtype=torch.float64))).sum()]).tolist()

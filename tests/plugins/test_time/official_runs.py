"""What the official codes answered on tiny networks, recorded with the commit they came from, and the networks and streams.

Weights and inputs are sines of their places. Everything is in float64.
"""

from __future__ import annotations

import torch
from official_values import filled, values_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RECORDED = values_of("test_time_official")
CLASSES = 4


def batch_norm_net():
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return filled(nn.Sequential(*layers))


def layer_norm_net():
    layers = (nn.Flatten(), nn.Linear(48, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8), nn.LayerNorm(8), nn.ReLU())
    return filled(nn.Sequential(*layers, nn.Linear(8, CLASSES)))


NETS = {"batch norm": batch_norm_net, "layer norm": layer_norm_net}


def images(count, side=4, phase=0.0):
    """Pictures of waves, and labels."""
    places = torch.arange(count * 3 * side * side, dtype=torch.float64)
    x = torch.sin(places * 2.3 + phase) + torch.cos(places * places * 0.01 + phase)
    return x.view(count, 3, side, side), torch.arange(count) % CLASSES


def loader(count=30, size=6, side=4, phase=0.0):
    return DataLoader(TensorDataset(*images(count, side, phase)), batch_size=size)


def mirror(x):
    """A view that is easy to write down."""
    return x.flip(-1) * 1.1 + 0.05


def recorded(method, key):
    """Logits of the official code, batch by batch."""
    return [torch.tensor(batch, dtype=torch.float64) for batch in RECORDED[method]["logits"][key]]


def vit_net():
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return filled(VisionTransformer(**sizes).double(), 0.4)


def first_prompts(prompts=3, width=12):
    """First prompts of FOA, which the official code draws."""
    return torch.sin(torch.arange(prompts * width, dtype=torch.float32)).view(prompts, width) / 4

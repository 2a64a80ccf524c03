"""The small ViT and the pictures that the official code of stage-wise weight sharing was run with."""

from __future__ import annotations

import torch
from growth_official_networks import pictures
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STAGES, DESCENDANT, LR, MOMENTUM = [3, 1, 2], [0, 0, 0, 1, 1, 2, 2], 0.05, 0.9
SIZES = {"img_size": 4, "patch_size": 2, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "num_classes": 3}


def network(depth):
    from timm.models.vision_transformer import VisionTransformer

    averaged = {"global_pool": "avg", "class_token": False, "fc_norm": False, "norm_layer": nn.LayerNorm}
    return VisionTransformer(**SIZES, **averaged, depth=depth).double()


def fill(parameters, stage):
    """Start parameters, by name, from waves of their stage."""
    for name, parameter in parameters:
        values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + 0.3 + stage).view(parameter.shape)
        parameter.data = 1 + values / 4 if "norm" in name and name.endswith("weight") else values / 2


def loader():
    return DataLoader(TensorDataset(pictures(8), torch.arange(8) % 3), batch_size=4)

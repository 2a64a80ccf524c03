"""The network, the data and the training that the official code of N:M sparsity was run with."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, EPOCHS, LR, WEIGHT_DECAY, SCALE = 6, 5, 0.05, 5e-5, 0.5


def network(conv=nn.Conv2d, linear=nn.Linear):
    """A first convolution and a head that stay dense, and a convolution and a linear layer between them."""
    body = (conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(8, 8), nn.ReLU(), linear(8, CLASSES))


def loader(count=32, side=6):
    places = torch.arange(count * 3 * side * side, dtype=torch.float64)
    x = torch.sin(places * 2.3) + torch.cos(places * places * 0.01)
    return DataLoader(TensorDataset(x.view(count, 3, side, side), torch.arange(count) % CLASSES), batch_size=8)


def wide_network(linear=nn.Linear):
    """Two layers to sparsify, without a bias, which the official code of MDGF and SDGF drops."""
    body = (nn.Linear(108, 16), nn.ReLU(), linear(16, 16, bias=False), nn.ReLU(), linear(16, 16, bias=False), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *body, nn.Linear(16, CLASSES))

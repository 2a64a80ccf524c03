"""The small VGG and the pictures that the official code of FTWT was run with."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, EPOCHS, LR, PREDICTOR_LR, WEIGHT_DECAY, SCALE = 6, 4, 0.01, 0.1, 5e-4, 0.5
WIDTHS = (8, 10, 12)


def network():
    layers, read = [], 3
    for width in WIDTHS:
        layers += [nn.Conv2d(read, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        read = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(read, CLASSES))


def loader(count=24, side=8):
    places = torch.arange(count * 3 * side * side, dtype=torch.float64)
    x = torch.sin(places * 2.3) + torch.cos(places * places * 0.01)
    return DataLoader(TensorDataset(x.view(count, 3, side, side), torch.arange(count) % CLASSES), batch_size=8)


def first_predictors(predictors):
    """Start predictors, ``(weight, bias)`` of each, from waves instead of from the draws of the official code."""
    for number, (weight, bias) in enumerate(predictors):
        places = torch.arange(weight.numel(), dtype=torch.float64) + number
        weight.data = torch.sin(places * 1.7).view(weight.shape).to(weight.dtype) * 2
        bias.data = torch.sin(torch.arange(bias.numel(), dtype=torch.float64) * 1.3 + number).to(bias.dtype) / 3

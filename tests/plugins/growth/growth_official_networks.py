"""The networks and the data that the official codes of growth were run with."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, CLASSES, LR = 6, 4, 0.01


class Block(nn.Module):
    """Four linear layers: eight tensors, as the official code of StackedBERT counts them in a layer."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        x = x + self.fc2(torch.tanh(self.fc1(x)))
        return x + self.fc4(torch.tanh(self.fc3(x)))


class Stack(nn.Module):
    """Two tensors before the layers and two behind them, in the names of the official code of StackedBERT."""

    def __init__(self, blocks=2):
        super().__init__()
        self.first, self.encoder, self.head = nn.Linear(5, WIDTH), nn.Module(), nn.Linear(WIDTH, CLASSES)
        self.encoder.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        x = self.first(x)
        for block in self.encoder.layers:
            x = block(x)
        return self.head(x)


def loader(count=20):
    places = torch.arange(count * 5, dtype=torch.float64)
    x = torch.sin(places * 2.3) + torch.cos(places * places * 0.01)
    return DataLoader(TensorDataset(x.view(count, 5), torch.arange(count) % CLASSES), batch_size=5)

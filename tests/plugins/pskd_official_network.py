"""The network and the data that the official code of PS-KD was run with."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

CLASSES, SAMPLES, EPOCHS, LR, WEIGHT_DECAY = 6, 22, 3, 0.1, 5e-4
STRIDES = (5, 7, 9)


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


class Waves(Dataset):
    """Samples without their index, or with it, as the official data sets give them."""

    classes = range(CLASSES)

    def __init__(self, indexed=False):
        places = torch.arange(SAMPLES * 5, dtype=torch.float64)
        self.x = (torch.sin(places * 2.3) + torch.cos(places * places * 0.01)).view(SAMPLES, 5)
        self.indexed = indexed

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        sample = (self.x[index], index * index % CLASSES)
        return (*sample, index) if self.indexed else sample


class Order(Sampler):
    """Another order in each epoch, so that samples meet others in their batches."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return iter([(place * STRIDES[self.epoch] + self.epoch) % SAMPLES for place in range(SAMPLES)])


def loader(indexed=False):
    return DataLoader(Waves(indexed), batch_size=5, sampler=Order())

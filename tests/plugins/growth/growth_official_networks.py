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


VIT = {"img_size": 4, "patch_size": 2, "embed_dim": 4, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "num_classes": 3}


def vit(**sizes):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**VIT | sizes).double()


def pictures(count=4):
    places = torch.arange(count * 3 * 4 * 4, dtype=torch.float64)
    return (torch.sin(places * 2.3) + torch.cos(places * places * 0.01)).view(count, 3, 4, 4)


def free(shape):
    """What a wider network's own weights are, where an operator leaves them free: waves from the first place on."""
    size = torch.Size(shape)
    return torch.sin(torch.arange(size.numel(), dtype=torch.float64) * 1.7 + 0.3).view(size) / 2


def bert(width=6, heads=2, ffn=8, depth=2):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": ffn, "num_hidden_layers": depth}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**sizes, **still, vocab_size=11, max_position_embeddings=8)).double()


def tokens():
    places = torch.arange(24)
    return ((places * places + 3 * places) % 13 % 11).view(4, 6)


def waves(rows, columns):
    """A first operator of LiGO, in place of drawn ones."""
    return free((rows, columns)) + torch.eye(rows, columns, dtype=torch.float64)

"""A network with a bit of everything that gets wider."""

from __future__ import annotations

import json

import torch
from torch import nn

from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import Layer, Norm, WidthMap


class Net(nn.Module):
    """A bit of everything: embedding tied to the head, norm, hidden layer, a raw parameter, a buffer, a noted number."""

    def __init__(self, width=4, ffn=6):
        super().__init__()
        self.width, self.words = width, 7
        self.embed = nn.Embedding(7, width)
        self.token = nn.Parameter(torch.randn(1, width))
        self.register_buffer("shift", torch.randn(width))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.token + self.shift
        return self.head(x + self.down(self.up(self.norm(x)).relu()))


LAYERS = {
    "embed": Layer(output="width"),
    "norm": Norm(),
    "up": Layer("width", "ffn"),
    "down": Layer("ffn", "width"),
    "head": Layer(input="width"),
}
NET = WidthMap(
    sizes={"width": 4, "ffn": 6},
    layers=LAYERS,
    tensors={"token": ("", "width"), "shift": ("width",)},
    attributes={"": {"width": "width"}},
)


def edit_of(net, to, prefix=""):
    return json.loads(json.dumps(width_edit(net, prefix, NET, to)))

"""The small LLaMA and the sentences that official codes for language models were run with."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from official_training import Learner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

WORDS, WIDTH, HEADS, HIDDEN, LENGTH, SENTENCES = 11, 8, 2, 16, 7, 6
SCALE = 0.1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Returns a tuple and takes a mask and positions, as the official code expects, and needs neither."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Gated()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x, attention_mask=None, position_ids=None):
        x = x + self.self_attn(self.input_layernorm(x))
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class Decoder(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, words):
        x = self.embed_tokens(words)
        for block in self.layers:
            x = block(x, attention_mask=None, position_ids=None)[0]
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, blocks=1):
        super().__init__()
        self.model, self.lm_head = Decoder(blocks), nn.Linear(WIDTH, WORDS, bias=False)
        self.config, self.seqlen, self.hf_device_map = SimpleNamespace(use_cache=False, hidden_size=WIDTH), LENGTH, {}

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.model(input_ids))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def sentences():
    places = torch.arange(SENTENCES * LENGTH)
    return ((places * places + 3 * places) % 13 % WORDS).view(SENTENCES, LENGTH)


class Reader(Learner):
    """Reads sentences one by one and learns nothing from them, as a calibration does."""

    def __init__(self, net):
        super().__init__(net, lr=0.0)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0], labels=batch[0]).loss


def sentence_loader():
    return DataLoader(TensorDataset(sentences()), batch_size=1)

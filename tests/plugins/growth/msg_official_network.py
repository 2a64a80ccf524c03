"""The small BERT that the official code of MSG was run with: its encoder between one embedding, there and back."""

from __future__ import annotations

from growth_official_networks import tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LR, GROW_TIME, VOCABULARY = 0.01, 4, 11


def config(**sizes):
    from transformers import BertConfig

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    usual = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6, "num_hidden_layers": 2}
    # A ReLU: the official code masks hidden units before the activation, ours behind it.
    return BertConfig(**usual | sizes, **still, hidden_act="relu", vocab_size=VOCABULARY)


class Container(nn.Module):
    """Names are those that the official code grows.

    Args:
        layers: The blocks, in a module that runs them or, as a list, to be run here.
    """

    def __init__(self, layers):
        super().__init__()
        self.bert, self.cls = nn.Module(), nn.Module()
        self.bert.embeddings, self.bert.encoder, self.bert.pooler = nn.Module(), nn.Module(), None
        self.bert.embeddings.word_embeddings = nn.Embedding(VOCABULARY, 8)
        if isinstance(layers, list):
            self.bert.encoder.layer = nn.ModuleList(layers)
        else:
            self.bert.encoder = layers
        self.cls.predictions = nn.Module()
        self.cls.predictions.transform, self.cls.predictions.decoder = nn.Linear(8, 8), nn.Linear(8, VOCABULARY, bias=False)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def encode(self, x):
        for block in self.bert.encoder.layer:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def forward(self, ids):
        x = self.encode(self.bert.embeddings.word_embeddings(ids))
        return self.cls.predictions.decoder(self.cls.predictions.transform(x)).transpose(1, 2)


def network():
    from transformers.models.bert.modeling_bert import BertLayer

    return Container([BertLayer(config()) for _ in range(2)]).double()


def loader():
    return DataLoader(TensorDataset(tokens(), tokens().roll(1, 1)), batch_size=1)

"""Small trained modules that the tests of several formats share."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import LayerGrowth, NMSparsity
from lightning_peft.testing import trainer
from lightning_peft.testing.modules import Conv, Plain, deepened, loader

Deep = deepened(Plain)


class Vision(LightningModule):
    """A timm ViT of two blocks on images of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Text(Vision):
    """A BERT of two layers, whose whole batch goes in by keyword."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
        )
        self.model = transformers.BertForSequenceClassification(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss


class Tied(Text):
    """A GPT-2 of two layers, whose head is its embedding."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        ids = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=8, n_embd=16, n_layer=2, n_head=2, **ids))


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tokens(samples: int) -> Tensor:
    return torch.randint(1, 32, (samples, 8), generator=torch.Generator().manual_seed(0))


def _sentences(*, causal: bool = False) -> DataLoader[Any]:
    rows = [{"input_ids": row, "labels": row if causal else row[0] % 3} for row in tokens(8)]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def _train(module: LightningModule, data: Any, method: Any, epochs: int = 2) -> LightningModule:
    evaluation = [loader(8)] if isinstance(module, Plain) else []
    trainer(max_epochs=epochs, callbacks=[method]).fit(module, data, *evaluation)
    return module


@functools.cache
def trained(kind: str) -> tuple[LightningModule, Any]:
    """Return a module after a few steps with a method, and inputs of its network; do not change either."""
    torch.manual_seed(0)
    if kind == "conv":
        return _train(Conv(), loader(), NMSparsity("2:4", targets="all-weights")), torch.randn(5, 16)
    if kind == "grown":
        return _train(Deep(), loader(), LayerGrowth(at="step:4", start=2), 3), torch.randn(5, 16)
    if kind == "vision":
        data = DataLoader([(image, index % 3) for index, image in enumerate(images(8))], batch_size=4)  # type: ignore[arg-type]
        return _train(Vision(), data, NMSparsity("2:4")), images(3)
    if kind == "tied":
        return _train(Tied(), _sentences(causal=True), NMSparsity("2:4")), {"input_ids": tokens(3), "use_cache": False}
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return _train(Text(), _sentences(), NMSparsity("2:4")), {"input_ids": tokens(3), "attention_mask": mask}


def network_of(module: LightningModule) -> nn.Module:
    return module if isinstance(module, Deep) else module.model

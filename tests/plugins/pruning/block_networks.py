"""Networks whose blocks are removed: real ones, and one some of whose blocks do nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, deepened, trainer
from lightning_peft_plugins.pruning.block_pruning import BlockPruning

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
models = pytest.importorskip("torchvision").models

Deep = deepened(Plain)


def silent(*places: int, blocks: int = 4) -> Plain:
    """A module some of whose blocks do nothing, and learn nothing."""
    torch.manual_seed(0)
    module = deepened(Plain, blocks)()
    for place in places:
        nn.init.zeros_(module.blocks[place].fc2.weight)
        nn.init.zeros_(module.blocks[place].fc2.bias)
        module.blocks[place].fc2.requires_grad_(False)
    return module


class Wrapped(LightningModule):
    """Trains a network on images or tokens."""

    def __init__(self, make: Callable[[], nn.Module], inputs: Tensor) -> None:
        super().__init__()
        self.network, self.inputs = make(), inputs

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.network(inputs)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch), torch.zeros(()).expand_as(self(batch)))

    def train_dataloader(self) -> Any:
        return DataLoader(self.inputs, batch_size=len(self.inputs))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20, "max_position_embeddings": 16}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))


def vit(depth: int) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "num_classes": 5}
    return timm.models.VisionTransformer(depth=depth, **sizes)


def llama(depth: int) -> nn.Module:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    config = transformers.LlamaConfig(**SIZES, **special, num_hidden_layers=depth, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def bert(depth: int) -> nn.Module:
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)  # its random numbers are not saved
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **dropout, num_hidden_layers=depth))


def resnet(*depths: int) -> nn.Module:
    return models.resnet.ResNet(models.resnet.BasicBlock, list(depths), num_classes=5)


NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], Tensor, list[str]]] = {
    "vit": (vit, (4,), IMAGES, ["network.blocks"]),
    "llama": (llama, (4,), TOKENS, ["network.model.layers"]),
    "bert": (bert, (4,), TOKENS, ["network.bert.encoder.layer"]),
    "resnet": (resnet, (2, 3, 1, 1), IMAGES, ["network.layer1", "network.layer2"]),
}


def cut(amount: int | float = 2, **settings: Any) -> BlockPruning:
    """A cut after two of four steps."""
    return BlockPruning(amount, start=2, every=1, **settings)


def train(module: LightningModule, folder: Path, resume: str = "", method: BlockPruning | None = None) -> None:
    """Four epochs of one step, with a checkpoint of each."""
    runner = trainer(callbacks=[method or cut(), every_epoch(folder)], max_epochs=4, log_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory")
        runner.fit(module, ckpt_path=folder / resume if resume else None, weights_only=True if resume else None)

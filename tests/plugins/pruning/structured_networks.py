"""Small networks of known families, and their groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft_plugins.pruning._structured_pruning.channels import Channels
from lightning_peft_plugins.pruning._structured_pruning.example import record

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 3, 8, 2, 2], [9, 4, 4, 1, 7, 6]])


def resnet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64)


def mobilenet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.MobileNetV2(num_classes=5, inverted_residual_setting=[[1, 8, 1, 1], [4, 8, 2, 1], [4, 16, 1, 2]])


def vgg() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(3, 8), *block(8, 12), nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 5))


def vit() -> nn.Module:
    models = pytest.importorskip("timm.models")
    return models.VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 20, "head_dim": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **special, num_hidden_layers=2, vocab_size=11))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, vocab_size=11, max_position_embeddings=8)
    return transformers.BertForSequenceClassification(config)


NETWORKS: dict[str, tuple[Any, Tensor]] = {
    "resnet": (resnet, IMAGES),
    "mobilenet": (mobilenet, IMAGES),
    "vgg": (vgg, IMAGES),
    "vit": (vit, IMAGES),
    "llama": (llama, IDS),
    "bert": (bert, IDS),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random norms and statistics, in eval mode, and its input."""
    torch.manual_seed(1)
    make, inputs = NETWORKS[name]
    network = make().eval()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in key or "weight" in key else value.normal_()
    return network, inputs


def output(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = network(inputs)
    return found if isinstance(found, Tensor) else found.logits


def channels(network: nn.Module, inputs: Tensor, **settings: Any) -> Channels:
    """The groups of a network that is the module itself."""
    given = {"kinds": ("channels", "heads"), "allowed": None, "counted": "params", **settings}
    return Channels(network, "", network, record((inputs,), {}), **given)


def squares(network: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.detach().square() for name, value in network.named_parameters(remove_duplicate=False)}

"""Small networks of known families, and their groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.structure.coupled.example import record
from lightning_peft_plugins.pruning._structured_pruning.channels import Channels

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


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class UNet(nn.Module):
    """Two resolutions, whose feature maps are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = conv(3, 8), conv(8, 12, stride=2)
        self.up, self.after, self.head = nn.ConvTranspose2d(12, 6, 2, 2), conv(14, 10), nn.Conv2d(10, 5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        outer = self.outer(inputs)
        return self.head(self.after(torch.cat([self.up(self.inner(outer)), outer], 1)))


class C2f(nn.Module):
    """A block of YOLOv8: one half goes on through residual blocks, and all that was seen on the way is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.last = conv(3, 16), conv(16, 16, 1), conv(32, 12, 1)
        self.blocks, self.head = nn.ModuleList(nn.Sequential(conv(8, 10), conv(10, 8)) for _ in range(2)), nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = list(self.first(self.stem(inputs)).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.head(self.last(torch.cat(parts, 1)).mean((2, 3)))


class CrossStage(nn.Module):
    """A block of CSPNet: two branches of one feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = conv(3, 16), conv(16, 8, 1), conv(16, 8, 1)
        self.blocks, self.last, self.head = nn.Sequential(conv(8, 8), conv(8, 8)), conv(16, 16, 1), nn.Linear(16, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.stem(inputs)
        return self.head(self.last(torch.cat((self.blocks(self.one(maps)), self.other(maps)), 1)).mean((2, 3)))


class WithInput(nn.Module):
    """What a layer made of an image, beside the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = conv(3, 8), conv(11, 10), nn.Linear(10, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.last(torch.cat([inputs, self.stem(inputs)], 1)).mean((2, 3)))


def densenet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=8, num_classes=5)


class Recurrent(nn.Module):
    """A recurrent layer over the columns of an image, between layers that are not."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.first, self.recurrent = conv(3, 8), kind(8 * 16, 6, batch_first=True, **settings)
        self.after = nn.Linear(6 * (1 + self.recurrent.bidirectional), 12)
        self.head = nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        columns = self.first(inputs).permute(0, 3, 1, 2).flatten(2)
        return self.head(nn.functional.silu(self.after(self.recurrent(columns)[0][:, -1])))


class Moved(nn.Module):
    """Channels that are moved on their way to the next layer."""

    WAYS = {
        "not": lambda maps: maps.flatten(1),
        "permute": lambda maps: maps.permute(0, 2, 3, 1).reshape(len(maps), -1),
        "roll": lambda maps: maps.roll(3, 1).flatten(1),
        "flip": lambda maps: maps.flip(1).flatten(1),
        "index": lambda maps: maps[:, [3, 1, 0, 2, 5, 4]].flatten(1),
        "channel shuffle": lambda maps: maps.unflatten(1, (2, 3)).transpose(1, 2).flatten(1),
        "pixel shuffle": lambda maps: nn.functional.pixel_shuffle(maps[:, :4], 2).flatten(1),
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.stem, self.moved = way, conv(3, 8), nn.Conv2d(8, 6, 3, 4, 1)
        self.reader = nn.Linear(64 if way == "pixel shuffle" else 96, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.reader(self.WAYS[self.way](self.moved(self.stem(inputs)))).relu())


def distilbert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"dim": 12, "n_heads": 3, "hidden_dim": 20, "n_layers": 2, "vocab_size": 11, "max_position_embeddings": 8}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 8, "vocab_size": 11}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=2))


def one_key() -> nn.Module:
    """A Llama whose query heads share one key-value head."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 20, "head_dim": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **special, num_hidden_layers=2, vocab_size=11))


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 12, "d_kv": 4, "num_heads": 3, "num_layers": 2, "d_ff": 20, "vocab_size": 11}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


class BothWays(nn.Module):
    """T5 that reads and writes the same tokens: attention of the encoder, of the decoder, and of one to the other."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"d_model": 12, "d_kv": 4, "num_heads": 3, "num_layers": 2, "d_ff": 20, "vocab_size": 11}
        self.t5 = transformers.T5Model(transformers.T5Config(**sizes, use_cache=False, decoder_start_token_id=0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.t5(input_ids=ids, decoder_input_ids=ids).last_hidden_state


def swin() -> nn.Module:
    models = pytest.importorskip("timm.models")
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
    return models.SwinTransformer(**sizes, num_classes=5)


def adapted_vit() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=r".*attn\.(qkv|proj)"))


class OneOperator(nn.Module):
    """Attention that is one operator for the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.attention = nn.Linear(16, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.inputs(images.mean(1))
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens)[0])
        return self.head((tokens + self.down(self.up(tokens).relu())).mean(1))


ATTENTION: dict[str, tuple[Any, Tensor]] = {
    "distilbert": (distilbert, IDS),
    "gpt2": (gpt2, IDS),
    "one key": (one_key, IDS),
    "swin": (swin, IMAGES),
    "adapted vit": (adapted_vit, IMAGES),
    "t5": (t5, IDS),
    "t5 decoder": (BothWays, IDS),
}
UNKNOWN_ATTENTION: dict[str, tuple[Any, Tensor]] = {"one operator": (OneOperator, IMAGES)}
CONCATENATED: dict[str, tuple[Any, Tensor]] = {
    "unet": (UNet, IMAGES),
    "c2f": (C2f, IMAGES),
    "cspnet": (CrossStage, IMAGES),
    "densenet": (densenet, IMAGES),
    "with input": (WithInput, IMAGES),
}
RECURRENT: dict[str, tuple[Any, Tensor]] = {
    "lstm": (lambda: Recurrent(nn.LSTM), IMAGES),
    "deep lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2), IMAGES),
    "gru": (lambda: Recurrent(nn.GRU), IMAGES),
    "rnn": (lambda: Recurrent(nn.RNN), IMAGES),
}
MOVED: dict[str, tuple[Any, Tensor]] = {way: (lambda way=way: Moved(way), IMAGES) for way in Moved.WAYS}  # type: ignore[misc]
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
    make, inputs = (NETWORKS | CONCATENATED | RECURRENT | MOVED | ATTENTION | UNKNOWN_ATTENTION)[name]
    network = make().eval()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in key or "weight" in key else value.normal_()
    return network, inputs


def output(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = network(inputs)
    return found if isinstance(found, Tensor) else found[0]


def channels(network: nn.Module, inputs: Tensor, **settings: Any) -> Channels:
    """The groups of a network that is the module itself."""
    given = {"kinds": ("channels", "heads"), "allowed": None, "counted": "params", **settings}
    return Channels(network, "", network, record((inputs,), {}), **given)


def squares(network: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.detach().square() for name, value in network.named_parameters(remove_duplicate=False)}

"""The layers that write into the residual stream are those without which a block passes its input on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from timm.layers import Mlp
from timm.models.mlp_mixer import MixerBlock, ResBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.vision_transformer import EncoderBlock

from lightning_peft_plugins.growth._layer_growth.residual_writers import residual_writers, writers_of_all

LN = partial(nn.LayerNorm, eps=1e-6)
TOKENS, MAP = torch.randn(2, 9, 8), torch.randn(2, 8, 5, 5)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "torchvision's ViT": (lambda: EncoderBlock(2, 8, 12, 0.0, 0.0, LN), TOKENS, ["self_attention.out_proj", "mlp.3"]),
    "ConvNeXt": (lambda: CNBlock(8, 1.0, 0.0), MAP, ["block.5"]),
    "MobileNetV2": (lambda: InvertedResidual(8, 8, 1, 2), MAP, ["conv.3"]),
    "timm's ViT": (lambda: Block(8, 2), TOKENS, ["attn.proj", "mlp.fc2"]),
    "Mixer": (lambda: MixerBlock(8, 9, mlp_layer=Mlp), TOKENS, ["mlp_tokens.fc2", "mlp_channels.fc2"]),
    "ResMLP": (lambda: ResBlock(8, 9), TOKENS, ["linear_tokens", "mlp_channels.fc2"]),
}


def silenced(block: nn.Module, tensors: list[str]) -> nn.Module:
    for name in tensors:
        nn.init.zeros_(block.get_parameter(name))
    return block.eval()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "ResMLP"])
def test_without_them_a_block_passes_its_input_on(name: str) -> None:
    make, inputs, writers = BLOCKS[name]
    found = residual_writers(make())
    assert list(dict.fromkeys(tensor.rpartition(".")[0] for tensor in found)) == writers
    assert torch.equal(silenced(make(), found)(inputs), inputs)
    for writer in writers:
        rest = [tensor for tensor in found if not tensor.startswith(f"{writer}.")]
        assert not torch.equal(silenced(make(), rest)(inputs), inputs), f"{writer} writes nothing"


def test_what_is_not_recognised_can_be_named() -> None:
    make, inputs, writers = BLOCKS["ResMLP"]
    assert not torch.equal(silenced(make(), residual_writers(make()))(inputs), inputs), "its token mixer is a bare layer"
    assert torch.equal(silenced(make(), residual_writers(make(), writers))(inputs), inputs)
    with pytest.raises(MisconfigurationException, match=r"No layer of Sequential was recognised.*it has \['0'\]"):
        residual_writers(nn.Sequential(nn.Linear(2, 2)))


def test_named_layers_may_stand_in_some_kinds_of_blocks_only() -> None:
    blocks = [Block(8, 2), MixerBlock(8, 9, mlp_layer=Mlp), nn.Identity()]
    found = writers_of_all(blocks, ["attn.proj", "mlp_tokens.fc2"])
    assert found == ["attn.proj.weight", "attn.proj.bias", "mlp_tokens.fc2.weight", "mlp_tokens.fc2.bias"]
    with pytest.raises(MisconfigurationException, match=r"outputs=\['attn\.out'\] are no layers of Block"):
        writers_of_all(blocks, ["attn.proj", "attn.out"])

"""Growth of real architectures: grown is what the class builds at that depth, and some operators change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.structure import edits
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.weights.maps import plain_values, set_plain_values
from lightning_peft_plugins.growth._layer_growth.operators import OPERATORS
from lightning_peft_plugins.growth._shared.blocks_to_grow import block_lists, check_equal, find_blocks

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def vit(depth: int) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=depth, num_heads=3, drop_path_rate=0.3)


def llama(depth: int) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=depth, num_key_value_heads=1, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config)


def qwen(depth: int) -> nn.Module:
    config = transformers.Qwen2Config(**SMALL, num_hidden_layers=depth, num_key_value_heads=1, max_position_embeddings=32)
    return transformers.Qwen2ForCausalLM(config)


def gpt2(depth: int) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=depth, vocab_size=50, n_positions=32, scale_attn_by_inverse_layer_idx=True
    )
    return transformers.GPT2LMHeadModel(config)


def bert(depth: int) -> nn.Module:
    config = transformers.BertConfig(**SMALL, num_hidden_layers=depth, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


NETWORKS = {"vit": (vit, "blocks"), "llama": (llama, "model.layers"), "qwen": (qwen, "model.layers")}
NETWORKS |= {"gpt2": (gpt2, "transformer.h"), "bert": (bert, "bert.encoder.layer")}


def inputs_of(network: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 50, (2, 7)) if hasattr(network, "config") else torch.randn(2, 3, 32, 32, dtype=torch.float64)


def outputs(network: nn.Module) -> Tensor:
    with torch.no_grad():
        out = network.double().eval()(inputs_of(network))
    return out if isinstance(out, Tensor) else out.logits


def deepen(network: nn.Module, path: str, operator: str, to: int) -> edits.Change:
    blocks = list(network.get_submodule(path).children())
    chosen = OPERATORS[operator]
    edit = blocks_edit(network, path, chosen.sources(len(blocks), to)) | chosen.settings([*blocks][:1], [])
    before = plain_values(network)
    change = edits.apply(network, edit)
    if chosen.blocks is not None:
        set_plain_values(network, chosen.blocks(before, edit, torch.Generator()))
    return change


def noted(network: nn.Module) -> dict[str, Any]:
    """Numbers that networks keep about their layers."""
    found: dict[str, Any] = {}
    for name, layer in network.named_modules():
        for key in ("layer_idx", "drop_prob", "scaling"):
            if isinstance(vars(layer).get(key), (int, float)):
                found[f"{name}.{key}"] = pytest.approx(vars(layer)[key])
    config = getattr(network, "config", None)
    if config is not None:
        found["config"] = config.to_dict()
    return found | {"features": getattr(network, "feature_info", None)}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("operator", ["stack", "interpolate"])
def test_grown_is_what_the_class_builds(kind: str, operator: str) -> None:
    build, path = NETWORKS[kind]
    network, target = build(3), build(7)
    assert find_blocks(network) == path
    deepen(network, path, operator, 7)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in target.state_dict().items()}
    assert list(shapes) == list(target.state_dict())
    assert noted(network) == noted(target)
    target.load_state_dict(network.state_dict())
    assert torch.allclose(outputs(network), outputs(target), atol=1e-12, rtol=0)  # GPT-2 rescales its attention


@pytest.mark.parametrize("kind", NETWORKS)
def test_undo_gives_back_the_network(kind: str) -> None:
    build, path = NETWORKS[kind]
    network = build(4)
    expected, before = noted(network), outputs(network)
    edits.undo(network, deepen(network, path, "interpolate", 7))
    edits.undo(network, edits.apply(network, blocks_edit(network, path, [0, 1])))
    assert noted(network) == expected
    assert torch.equal(outputs(network), before)


@pytest.mark.parametrize("kind", ["vit", "llama", "qwen", "gpt2"])
@pytest.mark.parametrize("operator", ["zero", "lemon", "net2net"])
def test_pre_norm_networks_compute_the_same(kind: str, operator: str) -> None:
    build, path = NETWORKS[kind]
    network = build(3)
    if kind == "gpt2":
        network.config.scale_attn_by_inverse_layer_idx = False
        for layer in network.modules():
            if hasattr(layer, "scale_attn_by_inverse_layer_idx"):
                layer.scale_attn_by_inverse_layer_idx = False
    before = outputs(network)
    deepen(network, path, operator, 6)
    assert (outputs(network) - before).abs().max() <= 1e-12


def test_copies_share_the_configuration() -> None:
    network = llama(2)
    deepen(network, "model.layers", "stack", 4)
    assert all(layer.self_attn.config is network.config for layer in network.model.layers)
    assert network.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_a_change_says_where_every_tensor_went() -> None:
    network = vit(2)
    old = {name: id(tensor) for name, tensor in network.named_parameters()}
    change = deepen(network, "blocks", "interpolate", 4)
    now = dict(network.named_parameters())
    assert all(id(now[change.new_name(name)]) == identity for name, identity in old.items())
    assert change.source("blocks.1.norm1.weight") == "blocks.0.norm1.weight"
    assert change.source("blocks.2.norm1.weight") is None
    assert change.source("norm.weight") is None


CNNS: dict[str, Callable[[], nn.Module]] = {
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=3),
    "resnet": lambda: timm.create_model("resnet26", num_classes=3),
}


def test_several_lists_are_named_not_guessed() -> None:
    network = timm.create_model("convnext_atto", num_classes=3, depths=(2, 2, 2, 2), dims=(8, 8, 12, 12))
    assert len(block_lists(network)) == 4
    with pytest.raises(MisconfigurationException, match=r"several lists.*'stages\.3\.blocks' \(2 blocks\)"):
        find_blocks(network)
    assert find_blocks(network, "stages.2.blocks") == "stages.2.blocks"
    before = outputs(network)
    deepen(network, "stages.2.blocks", "stack", 3)
    assert outputs(network).shape == before.shape


def test_unequal_blocks_are_refused() -> None:
    network = timm.create_model("resnet26", num_classes=3)
    with pytest.raises(MisconfigurationException, match="not equal"):
        check_equal(network, "layer3")


def test_resnet_blocks_end_in_a_norm_that_can_be_zero() -> None:
    network = timm.create_model("resnet18", num_classes=3)
    torch.nn.init.ones_(network.layer2[1].bn2.weight)
    tail = nn.Sequential(network.layer2[1])
    wrapped = nn.Sequential(tail)
    inputs = torch.rand(2, 128, 4, 4, dtype=torch.float64)
    wrapped.double().eval()
    with torch.no_grad():
        before = wrapped(inputs)
        deepen(wrapped, "0", "zero", 3)
        assert torch.equal(wrapped(inputs), before)


def test_nothing_to_grow() -> None:
    with pytest.raises(MisconfigurationException, match="no list of equal blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))
    with pytest.raises(MisconfigurationException, match=r"Lists of equal blocks: 'blocks' \(3 blocks\)"):
        find_blocks(vit(3), "layers")

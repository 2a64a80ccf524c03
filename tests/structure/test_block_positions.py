"""After an edit of depth, the network's own class builds what was made of it: configuration, attributes, buffers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_peft.structure import edits
from lightning_peft.structure.class_twin import fresh
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.errors import CheckpointError

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SIZES, "num_key_value_heads": 1, "vocab_size": 50, "pad_token_id": 0}
IDS = torch.arange(3, 23).reshape(1, 20)
IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXTS, PAIRS = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS}


def gemma2(blocks: int, **more: Any) -> nn.Module:
    settings = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, **more}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT, **settings, num_hidden_layers=blocks))


def gemma3(blocks: int) -> nn.Module:
    config = transformers.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, num_hidden_layers=blocks)
    return transformers.Gemma3ForCausalLM(config)


def smollm3(blocks: int) -> nn.Module:
    return transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**TEXT, no_rope_layer_interval=2, num_hidden_layers=blocks)
    )


def llama4(blocks: int) -> nn.Module:
    settings = {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, "no_rope_layer_interval": 2}
    return transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(**TEXT, **settings, interleave_moe_layer_step=1, num_hidden_layers=blocks)
    )


def gpt_neo(blocks: int) -> nn.Module:
    settings = {"hidden_size": 16, "num_heads": 2, "vocab_size": 50, "max_position_embeddings": 32, "window_size": 4}
    types = [[["global", "local"], blocks // 2]]
    return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**settings, attention_types=types, num_layers=blocks))


def bart(encoder: int, decoder: int) -> nn.Module:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BartConfig(
        **heads, d_model=16, vocab_size=50, max_position_embeddings=32, encoder_layers=encoder, decoder_layers=decoder
    )
    return transformers.BartForConditionalGeneration(config)


def swin(blocks: int) -> nn.Module:
    settings = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [1, 2], "window_size": 4}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**settings, depths=[2, blocks]))


def convnext(blocks: int) -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, blocks], num_stages=2, drop_path_rate=0.2)
    return transformers.ConvNextForImageClassification(config)


def beit(blocks: int) -> nn.Module:
    config = transformers.BeitConfig(**SIZES, image_size=32, patch_size=8, drop_path_rate=0.3, num_hidden_layers=blocks)
    return transformers.BeitForImageClassification(config)


LAYERS = "model.layers"
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], str, dict[str, Any]]] = {
    "layer types": (gemma2, LAYERS, TEXTS),
    "a rotary embedding only some blocks need": (gemma3, LAYERS, TEXTS),
    "no positions in some blocks": (smollm3, LAYERS, TEXTS),
    "layers without tensors in some blocks": (llama4, LAYERS, TEXTS),
    "masks in buffers that are not saved": (gpt_neo, "transformer.h", TEXTS),
    "a decoder beside an encoder": (lambda blocks: bart(2, blocks), "model.decoder.layers", PAIRS),
    "an encoder beside a decoder": (lambda blocks: bart(blocks, 2), "model.encoder.layers", PAIRS),
    "shifted windows, and rates over all stages": (swin, "swin.encoder.layers.1.blocks", {"pixel_values": IMAGES}),
    "a stage": (convnext, "convnext.encoder.stages.1.layers", {"pixel_values": IMAGES}),
    "stochastic depth of transformers": (beit, "beit.layers", {"pixel_values": IMAGES}),
}


def rebuilt(network: Any) -> nn.Module:
    """What the network's class makes of its configuration, saved and read back, and of its weights."""
    twin = type(network)(fresh(network.config))
    twin.load_state_dict(network.state_dict())
    return twin.eval()


def outputs(network: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False})).logits


def notes(network: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, layer in network.named_modules()
        for key, value in vars(layer).items()
        if isinstance(value, (int, float, str, type(None))) and not key.startswith("_") and key != "training"
    }


@pytest.mark.parametrize("steps", [[[0, 1, 0, 1]], [[0, 0, 0, 1, 1]], [[0, 1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3]]], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_class_builds_what_was_grown(kind: str, steps: list[list[int]]) -> None:
    build, path, inputs = NETWORKS[kind]
    torch.manual_seed(0)
    network = build(2)
    before, was = notes(network), vars(fresh(network.config))  # type: ignore[arg-type]
    changes = [edits.apply(network, blocks_edit(network, path, sources)) for sources in steps]
    twin = rebuilt(network)
    assert torch.equal(outputs(network, inputs), outputs(twin, inputs))
    assert notes(network) == notes(twin)
    for change in reversed(changes):
        edits.undo(network, change)
    assert notes(network) == before
    assert vars(fresh(network.config)) == was  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_begins_small_ends_as_it_was_built(kind: str) -> None:
    build, path, inputs = NETWORKS[kind]
    torch.manual_seed(0)
    network, built = build(6), build(6)
    edits.apply(network, blocks_edit(network, path, [0, 1, 2]))
    assert torch.equal(outputs(network, inputs), outputs(rebuilt(network), inputs))
    edits.apply(network, blocks_edit(network, path, [0, 0, 1, 1, 2, 2]))
    built.load_state_dict(network.state_dict())
    assert torch.equal(outputs(network, inputs), outputs(built, inputs))
    assert notes(network) == notes(built)


def test_lists_that_the_user_wrote_are_kept_by_position() -> None:
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 4
    network = gemma2(6, layer_types=list(kinds))
    edits.apply(network, blocks_edit(network, LAYERS, [0, 1, 2]))
    edits.apply(network, blocks_edit(network, LAYERS, [0, 1, 2, 0, 1, 2]))
    assert network.config.layer_types == kinds
    assert [layer.self_attn.layer_type for layer in network.model.layers] == kinds  # type: ignore[union-attr]


def test_blocks_that_stay_keep_their_kind_where_the_configuration_can_say_it() -> None:
    network = gemma2(4)
    edits.apply(network, blocks_edit(network, LAYERS, [0, 2, 3]))
    assert network.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert torch.equal(outputs(network, TEXTS), outputs(rebuilt(network), TEXTS))


def test_what_a_user_changed_stays() -> None:
    network = gemma2(2)
    for layer in network.model.layers:  # type: ignore[union-attr]
        layer.self_attn.sliding_window = 7
    edits.apply(network, blocks_edit(network, LAYERS, [0, 1, 0, 1]))
    assert [layer.self_attn.sliding_window for layer in network.model.layers] == [7] * 4  # type: ignore[union-attr]


class Framed(nn.Module):
    """A head that reads every block, so that the class builds another one for another number of blocks."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(config.n_layer))
        self.head = nn.Linear(4 * config.n_layer, 1)


def test_the_first_difference_is_named_and_nothing_is_changed() -> None:
    network = Framed(SimpleNamespace(n_layer=2))
    before = list(network.blocks)
    with pytest.raises(CheckpointError, match=r"cannot build blocks with 4 blocks.*n_layer=4 it has head.weight \[1, 16\]"):
        blocks_edit(network, "blocks", [0, 1, 0, 1])
    edit = blocks_edit(network, "blocks", [0, 1, 0, 1], check="off")
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        edits.apply(network, {key: value for key, value in edit.items() if key != "check"})  # type: ignore[arg-type]
    assert list(network.blocks) == before
    assert network.config.n_layer == 2
    edits.apply(network, edit)
    assert len(network.blocks) == 4


def test_a_configuration_that_rebuilds_nothing_is_left_to_itself() -> None:
    network = nn.Module()
    network.config = SimpleNamespace(n_layer=2)  # type: ignore[assignment]
    network.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    edits.apply(network, blocks_edit(network, "blocks", [0, 1, 0]))
    assert network.config.n_layer == 3


def test_random_numbers_of_the_training_go_on_untouched() -> None:
    network = gpt_neo(2)
    state = torch.get_rng_state()
    edits.apply(network, blocks_edit(network, "transformer.h", [0, 1, 0, 1]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["layer types", "no positions in some blocks", "shifted windows, and rates over all stages"])
def test_one_block_cannot_stand_where_the_class_makes_different_ones(kind: str) -> None:
    build, path, _ = NETWORKS[kind]
    network = build(4)
    with pytest.raises(CheckpointError, match=r"One block cannot stand at positions 0 and 1"):
        blocks_edit(network, path, [0, 0, 2, 2], shared=True)
    blocks_edit(network, path, [0, 1, 0, 1], shared=True)  # stages of every other block are alike

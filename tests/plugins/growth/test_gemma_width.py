"""What sets a wider Gemma apart from a wider Llama: norms add 1 to their weight, and embeddings have a scale."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_toys import grow as train
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_resume import check_resume
from torch import Tensor, nn
from width_networks import EXACT, IDS, gemma, grow, patch_rms_norm, ready, run

import lightning_peft
from lightning_peft import LayerGrowth
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.width import check_resize, undo_resize
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import CLASSES, Plain
from lightning_peft_plugins.growth._layer_growth import lemon, msg, net2net
from lightning_peft_plugins.growth._layer_growth.masking import Masks
from lightning_peft_plugins.growth._layer_growth.width_families import find_width_map

transformers = pytest.importorskip("transformers")
KINDS = ["Gemma", "Gemma2", "Gemma3"]


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rms_norm(monkeypatch)


@torch.no_grad()
def outputs(net: nn.Module) -> Tensor:
    found: Tensor = run(net)
    return found


def test_four_times_the_width_doubles_the_root() -> None:
    """By hand, from width 16 to 64: the root goes from 4 to 8."""
    net = gemma(16, 8, 4)
    with torch.no_grad():
        net.model.embed_tokens.weight.fill_(0.5)
        net.model.norm.weight.fill_(0.25)
        net.model.layers[0].input_layernorm.weight.fill_(0.25)
    assert net.model.embed_tokens.embed_scale == 4
    grow(net, {"width": 64}, net2net.net2net)
    embedding = net.model.embed_tokens
    assert (float(embedding.embed_scale), embedding.scalar_embed_scale) == (8.0, 8.0)
    assert embedding.weight.unique().tolist() == [0.25]  # 0.25 * 8 = 0.5 * 4
    assert embedding(IDS).unique().tolist() == [2.0]
    assert net.lm_head.weight is embedding.weight
    # Of 1.25 each of four copies gives a quarter to the head, whose weight was halved: 1.25 / 4 * 2 - 1.
    assert net.model.norm.weight.unique().tolist() == [-0.375]
    assert net.model.layers[0].input_layernorm.weight.unique().tolist() == [0.25]


def test_new_factors_of_norms_are_1_behind_masks() -> None:
    net = gemma(16, 8, 4)
    grow(net, {"width": 32}, msg.msg)
    assert not bool(net.model.layers[0].post_feedforward_layernorm.weight.any())


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_masks_open_without_a_jump(kind: str) -> None:
    net = ready(gemma(kind=kind))
    before = outputs(net)
    masks = Masks.install(net, grow(net, {"width": 16, "heads": 8, "ffn": 27}, msg.msg))
    assert float((outputs(net) - before).abs().max()) <= EXACT
    masks.set(1.0 - 1e-9)
    nearly = outputs(net)
    masks.remove()
    assert float((outputs(net) - nearly).abs().max()) <= 1e-6
    assert float((nearly - before).abs().max()) > 1e-2


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_model_repeats_its_states(kind: str) -> None:
    net = ready(gemma(kind=kind, head="Model"))
    before = outputs(net)
    grow(net, {"width": 27, "heads": 9}, lemon.lemon, lemon.with_eps)
    assert float((outputs(net)[..., :24] - before.repeat(1, 1, 2)).abs().max()) <= EXACT


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("to", "operator"), [({"width": 24}, net2net.net2net), ({"width": 27, "heads": 9}, lemon.lemon)])
def test_files_and_generation_are_those_of_the_class(kind: str, to: dict[str, int], operator: Any, tmp_path: Path) -> None:
    net = ready(gemma(kind=kind))
    before = outputs(net)
    tokens = partial(transformers.GenerationMixin.generate, max_new_tokens=8, do_sample=False)
    said = tokens(net, IDS)
    grow(net, to, operator, lemon.with_eps if operator is lemon.lemon else lambda edit: edit)
    assert float((outputs(net) - before).abs().max()) <= EXACT
    net.float().save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    assert again.config.to_diff_dict() == net.config.to_diff_dict()
    assert torch.equal(outputs(again), outputs(net))
    for model in (net, again):
        assert torch.equal(tokens(model, IDS), said)
        assert torch.equal(tokens(model, IDS, use_cache=False), said)


def test_lemon_scales_what_norms_of_queries_read_as_their_epsilon() -> None:
    net = gemma(rms_norm_eps=0.1)
    edit = lemon.with_eps(width_edit(net, "", find_width_map(net), {"width": 15, "heads": 15, "ffn": 25}))
    attention = "model.layers.0.self_attn"
    assert edit["attributes"][f"{attention}.q_norm"]["eps"] == [0.1, pytest.approx(0.08)]
    assert edit["tensors"][f"{attention}.k_proj.weight"]["factor"] == pytest.approx(0.8**0.5)
    assert edit["config"]["rms_norm_eps"] == [0.1, pytest.approx(0.08)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_root_is_the_one_that_the_class_makes(dtype: torch.dtype) -> None:
    net, wide = gemma().to(dtype), gemma(24, 12, 6, 40).to(dtype)
    edit = grow(net, {"width": 24}, net2net.net2net)
    embedding, as_built = net.model.embed_tokens, wide.model.embed_tokens
    assert embedding.embed_scale.dtype == dtype
    assert embedding.embed_scale == as_built.embed_scale
    assert embedding.scalar_embed_scale == as_built.scalar_embed_scale
    undo_resize(net, edit)
    assert embedding.embed_scale == gemma().to(dtype).model.embed_tokens.embed_scale


@pytest.mark.usefixtures("_float64")
def test_a_root_that_was_rounded_keeps_the_function() -> None:
    """Loaded in bfloat16 and trained in single precision: the class makes 3.464, the buffer holds 3.469."""
    net = ready(gemma())
    net.model.embed_tokens.embed_scale = net.model.embed_tokens.embed_scale.bfloat16().double()
    before = outputs(net)
    edit = width_edit(net, "", find_width_map(net), {"width": 24})
    check_resize(gemma(), edit)  # a module built anew, in which the checkpoint is loaded
    grow(net, {"width": 24}, net2net.net2net)
    assert float((outputs(net) - before).abs().max()) <= EXACT
    assert float(net.model.embed_tokens.embed_scale) == pytest.approx(24**0.5, rel=1e-7)


@pytest.mark.usefixtures("_float64")
def test_a_class_that_multiplies_beside_the_layer() -> None:
    """Earlier versions of transformers multiply in forward, by the root of what the configuration says."""

    class Before(type(gemma(kind="Gemma").model)):  # type: ignore[misc]
        def forward(self, ids: Tensor) -> Any:
            normal = torch.tensor(self.config.hidden_size**0.5, dtype=torch.float64)
            return super().forward(inputs_embeds=self.embed_tokens(ids) * normal)

    net = ready(Before(gemma(kind="Gemma").config))
    net.embed_tokens.__class__ = nn.Embedding
    del net.embed_tokens.embed_scale, net.embed_tokens.scalar_embed_scale
    before = outputs(net)
    grow(net, {"width": 24}, net2net.net2net)
    assert float((outputs(net) - before.repeat(1, 1, 2)).abs().max()) <= EXACT


@pytest.mark.parametrize("value", [1e6, 4.0, 24.0])
def test_a_record_sets_no_other_root(value: float) -> None:
    net = gemma()
    edit = copy.deepcopy(width_edit(net, "", find_width_map(net), {"width": 24}))
    check_resize(net, edit)
    edit["attributes"]["model.embed_tokens"]["embed_scale"][1] = value
    with pytest.raises(CheckpointError, match=r"embed_scale from 3\.46"):
        check_resize(net, edit)


def test_another_root_than_that_of_the_width_is_refused() -> None:
    net = gemma()
    net.model.embed_tokens.embed_scale = torch.tensor(1.0)
    with pytest.raises(MisconfigurationException, match=r"embed_scale is 1\.0; the width map says root width = the root of 12"):
        width_edit(net, "", find_width_map(net), {"width": 24})


def test_a_gemma_with_pictures_asks_for_a_map() -> None:
    text = gemma().config.to_dict()
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 28}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    net = transformers.Gemma3ForConditionalGeneration(config)
    with pytest.raises(MisconfigurationException, match=r"unknown structure.*Give width_map="):
        find_width_map(net)


class TinyGemma(Plain):
    """Sixteen signs as a text; what would come next is the class."""

    number, sizes = "Gemma3", (12, 6, 3, 20)

    def build(self) -> None:
        self.model = gemma(*self.sizes, kind=self.number)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model((inputs > 0).long() + 3).logits
        return logits[:, -1, :CLASSES]


class LargeGemma(TinyGemma):
    sizes = (24, 12, 6, 40)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("net2net", {"optimizer_state": "copy"}),
        ("aki", {}),
        ("lemon", {"optimizer_state": "pad"}),
        ("msg", {"grow_time": 3}),
        ("ligo", {"operator_steps": 3}),
    ],
)
@pytest.mark.parametrize("averaged", [False, True])
def test_resumes_bit_for_bit(operator: str, options: dict[str, Any], averaged: bool, tmp_path: Path) -> None:
    def methods() -> Any:
        return [LayerGrowth(operator, at="step:6", to={"width": 24, "depth": 3}, **options)]

    trained = check_resume(methods, tmp_path, style=TinyGemma, averaged=averaged)
    assert float(trained.module.model.model.embed_tokens.embed_scale) == pytest.approx(24**0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("operator", "width"), [("net2net", 24), ("lemon", 27), ("msg", 27)])
def test_loss_stays_where_nothing_is_learnt(kind: str, operator: str, width: int, recwarn: pytest.WarningsRecorder) -> None:
    class Still(TinyGemma):
        number = kind

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    to = {"width": width, "heads": 9 if width == 27 else 12, "ffn": 40}
    trained = train([LayerGrowth(operator, at="step:4", to=to)], style=Still, max_epochs=2)
    assert trained.losses[4:] == pytest.approx(trained.losses[:4], abs=1e-5)
    assert not [warning for warning in recwarn if "promises" in str(warning.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_loads_into_a_small_and_into_a_large_network(kind: str, tmp_path: Path) -> None:
    class Small(TinyGemma):
        pass

    class Large(LargeGemma):
        pass

    Small.number = Large.number = kind
    torch.manual_seed(0)
    trained = train([LayerGrowth("lemon", at="step:6", to={"width": 24})], style=Small, after=[every_epoch(tmp_path)])
    probe = torch.linspace(-1, 1, 48).view(3, 16)
    expected = trained.module.eval()(probe)
    for style in (Small, Large):
        loaded = lightning_peft.load_from_checkpoint(style, tmp_path / "epoch=2.ckpt").eval()
        assert torch.equal(loaded(probe), expected)
    lightning_peft.bake_checkpoint(tmp_path / "epoch=2.ckpt", tmp_path / "baked.ckpt")
    plain = Large.load_from_checkpoint(tmp_path / "baked.ckpt", weights_only=True)
    assert torch.equal(plain.eval()(probe), expected)

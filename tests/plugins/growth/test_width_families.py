"""Families of transformers beside the first four: growth changes nothing, and the class builds what came of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from width_networks import EXACT, IDS, IMAGES, gemma, grow, patch_rms_norm, ready

from lightning_peft_plugins.growth._layer_growth import lemon, net2net

transformers = pytest.importorskip("transformers")
BASE = {"num_hidden_layers": 2, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 6}
TEXT = BASE | {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 3}
POSITIONS = {"max_position_embeddings": 10, "pad_token_id": 0}


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, head_dim=2, sliding_window=4))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, tie_word_embeddings=True))


def roberta(head: str = "RobertaForMaskedLM") -> nn.Module:
    sizes = BASE | {"num_attention_heads": 3, "vocab_size": 11}
    return getattr(transformers, head)(transformers.RobertaConfig(**sizes, **POSITIONS))


def vit() -> nn.Module:
    sizes = BASE | {"num_attention_heads": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))


@pytest.fixture(autouse=True)
def _float64_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RMSNorm of transformers computes in float32 whatever the model's dtype."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (
        transformers.models.mistral.modeling_mistral.MistralRMSNorm,
        transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm,
    ):
        monkeypatch.setattr(norm, "forward", forward)
    patch_rms_norm(monkeypatch)


def logits(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return (net(IMAGES) if hasattr(net, "vit") else net(IDS)).logits


CASES = [
    (mistral, {"width": 24}, net2net.net2net),
    (mistral, {"width": 27, "heads": 9, "ffn": 33}, lemon.lemon),
    (qwen2, {"width": 24}, net2net.net2net),
    (qwen2, {"width": 16, "ffn": 33}, lemon.lemon),
    (partial(gemma, kind="Gemma"), {"width": 24}, net2net.net2net),
    (partial(gemma, kind="Gemma"), {"width": 16, "ffn": 33}, lemon.lemon),
    (partial(gemma, kind="Gemma2"), {"width": 24}, net2net.net2net),
    (partial(gemma, kind="Gemma2"), {"width": 27, "heads": 9, "ffn": 33}, lemon.lemon),
    (gemma, {"width": 24}, net2net.net2net),
    (gemma, {"width": 27, "heads": 9, "ffn": 33}, lemon.lemon),
    (roberta, {"width": 24}, net2net.net2net),
    (partial(roberta, "RobertaForSequenceClassification"), {"width": 24, "ffn": 33}, lemon.lemon),
    (partial(roberta, "RobertaForTokenClassification"), {"width": 36}, lemon.lemon),
    (vit, {"width": 24}, net2net.net2net),
    (vit, {"width": 16, "ffn": 33}, lemon.lemon),
]


@pytest.mark.parametrize(("build", "to", "operator"), CASES)
def test_growth_changes_nothing_and_the_class_builds_it(build: Any, to: dict[str, int], operator: Any) -> None:
    torch.manual_seed(0)
    net = ready(build())
    before = logits(net)
    grow(net, to, operator, lemon.with_eps if operator is lemon.lemon else lambda edit: edit)
    assert float((logits(net) - before).abs().max()) <= EXACT
    assert before.std() > 0.01
    built = type(net)(net.config).double().eval()
    built.load_state_dict(net.state_dict())
    assert float((logits(built) - before).abs().max()) <= EXACT


def test_a_size_that_qwen2_cannot_be_built_with_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Give width=16, or leave out heads"):
        grow(ready(qwen2()), {"width": 20, "heads": 8, "ffn": 40}, lemon.lemon)
    grow(ready(qwen2()), {"width": 16, "heads": 8, "ffn": 40}, lemon.lemon, lemon.with_eps)

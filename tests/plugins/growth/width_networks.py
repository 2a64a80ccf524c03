"""Small networks of known families, in float64, and how they get wider."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from lightning_peft.structure.width import check_resize, resize
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.weights.maps import plain_values, set_plain_values
from lightning_peft_plugins.growth._layer_growth.width_families import find_width_map

EXACT = 1e-12
IDS = torch.tensor([[1, 5, 3, 8, 2, 2], [9, 4, 4, 1, 7, 6]])
IMAGES = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def vit(width=12, heads=3, ffn=None, distilled=False, **options):
    models = pytest.importorskip("timm.models")
    cls = models.deit.VisionTransformerDistilled if distilled else models.VisionTransformer
    ratio = (ffn or 4 * width) / width
    options = {"img_size": 8, "patch_size": 4, "depth": 2, "num_classes": 5, "mlp_ratio": ratio, **options}
    return cls(embed_dim=width, num_heads=heads, **options)


def packed_swiglu(width=12, heads=3, ffn=10):
    layers = pytest.importorskip("timm.layers")
    return vit(width, heads, 2 * ffn, mlp_layer=layers.SwiGLUPacked)


def rms_vit(width=12, heads=3, ffn=None):
    layers = pytest.importorskip("timm.layers")
    return vit(width, heads, ffn, norm_layer=partial(layers.RmsNorm, eps=1e-6))


def llama(width=12, heads=6, kv_heads=3, ffn=20, tied=True, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 2, "tie_word_embeddings": tied}
    config = transformers.LlamaConfig(**sizes, **special, num_hidden_layers=2, vocab_size=11, **options)
    return transformers.LlamaForCausalLM(config)


def gemma(width=12, heads=6, kv_heads=3, ffn=20, kind="Gemma3", head="ForCausalLM", **options):
    """Every second block attends to a window, and scores have a scale of their own, where the kind of Gemma has that."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn}
    later = {} if kind == "Gemma" else {"query_pre_attn_scalar": 3, "sliding_window": 4}
    later |= {"layer_types": ["sliding_attention", "full_attention"]} if later else {}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 2}
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    kind = "Gemma3Text" if kind == "Gemma3" and head != "ForCausalLM" else kind
    return getattr(transformers, kind + head)(
        config(**sizes, **special, **later, num_hidden_layers=2, vocab_size=11, **options)
    )


def bert(width=12, heads=3, ffn=20, head="BertForMaskedLM"):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": ffn}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, vocab_size=11, max_position_embeddings=8)
    return getattr(transformers, head)(config)


def gpt2(width=12, heads=3, ffn=None, head="GPT2LMHeadModel"):
    transformers = pytest.importorskip("transformers")
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.GPT2Config(
        n_embd=width, n_head=heads, n_inner=ffn, n_layer=2, vocab_size=11, n_positions=8, **special
    )
    return getattr(transformers, head)(config)


def patch_rms_norm(monkeypatch):
    """The RMSNorm of transformers computes in float32 whatever the model's dtype."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def plus_one(self, x):
        return (1 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    monkeypatch.setattr(modeling.LlamaRMSNorm, "forward", forward)
    for kind in ("Gemma", "Gemma2", "Gemma3"):
        modeling = pytest.importorskip(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
        monkeypatch.setattr(getattr(modeling, f"{kind}RMSNorm"), "forward", plus_one)


@torch.no_grad()
def ready(net):
    """Random everywhere, norms and biases included, in float64."""
    for parameter in net.parameters():
        parameter.copy_(0.4 * torch.randn_like(parameter))
    return net.double().eval()


def run(net):
    if "VisionTransformer" in [base.__name__ for base in type(net).__mro__]:
        return net(IMAGES)
    output = net(IDS)
    return output[0]


def grow(net, to, operator, prepare=lambda edit: edit):
    edit = json.loads(json.dumps(prepare(width_edit(net, "", find_width_map(net), to))))
    values = {name: value.clone() for name, value in plain_values(net).items()}
    check_resize(net, edit)
    resize(net, edit)
    new = operator(values, edit, torch.Generator().manual_seed(1))
    assert {name: list(value.shape) for name, value in new.items()} == {n: e["to"] for n, e in edit["tensors"].items()}
    set_plain_values(net, new)
    return edit


MULTIPLE = [
    (vit, {"width": 24}),
    (vit, {"width": 24, "ffn": 53}),
    (vit, {"ffn": 53}),
    (partial(vit, init_values=0.1, qk_norm=True, reg_tokens=2), {"width": 24}),
    (partial(vit, global_pool="avg"), {"width": 36}),
    (partial(vit, pre_norm=True), {"width": 24}),
    (partial(vit, distilled=True), {"width": 24}),
    (packed_swiglu, {"width": 24, "ffn": 23}),
    (rms_vit, {"width": 24}),
    (llama, {"width": 24}),
    (llama, {"width": 36, "heads": 9, "ffn": 33}),
    (llama, {"heads": 12, "kv_heads": 4}),
    (partial(llama, kv_heads=1), {"heads": 12}),
    (partial(llama, tied=False, attention_bias=True, mlp_bias=True), {"width": 24}),
    (partial(gemma, kind="Gemma"), {"width": 24}),
    (partial(gemma, kind="Gemma", tie_word_embeddings=False), {"width": 36, "heads": 9, "ffn": 33}),
    (partial(gemma, kind="Gemma2"), {"width": 36, "heads": 9, "ffn": 33}),
    (gemma, {"width": 24}),
    (gemma, {"heads": 12, "kv_heads": 4}),
    (partial(gemma, head="ForSequenceClassification"), {"width": 24}),
    (partial(gemma, tie_word_embeddings=False, attention_bias=True), {"width": 24}),
    (bert, {"width": 24, "ffn": 33}),
    (partial(bert, head="BertForPreTraining"), {"width": 24}),
    (partial(bert, head="BertForSequenceClassification"), {"width": 36}),
    (gpt2, {"width": 24}),
    (partial(gpt2, head="GPT2ForTokenClassification"), {"width": 24}),
    (partial(gpt2, head="GPT2ForQuestionAnswering", ffn=30), {"width": 24, "ffn": 77}),
]
ANY = [
    (vit, {"width": 16}),
    (vit, {"width": 20, "ffn": 50}),
    (vit, {"width": 32}),
    (partial(vit, init_values=0.1, qk_norm=True, reg_tokens=2), {"width": 20}),
    (partial(vit, global_pool="avg"), {"width": 28}),
    (partial(vit, distilled=True), {"width": 16}),
    (packed_swiglu, {"width": 20, "ffn": 23}),
    (rms_vit, {"width": 20}),
    (llama, {"width": 16, "heads": 8, "ffn": 27}),
    (llama, {"width": 27, "heads": 9, "ffn": 33}),
    (partial(llama, tied=False), {"width": 30, "heads": 15, "kv_heads": 5, "ffn": 21}),
    (partial(gemma, kind="Gemma"), {"width": 16, "heads": 8, "ffn": 27}),
    (partial(gemma, kind="Gemma2", tie_word_embeddings=False), {"width": 27, "heads": 9, "ffn": 33}),
    (gemma, {"width": 27, "heads": 9, "ffn": 33}),
    (partial(gemma, kind="Gemma", head="ForTokenClassification", attention_bias=True), {"width": 16, "heads": 8, "ffn": 27}),
    (gpt2, {"width": 16}),
    (gpt2, {"width": 32, "ffn": 51}),
]
POST = [(bert, {"width": 16, "ffn": 33}), (partial(vit, pre_norm=True), {"width": 16})]

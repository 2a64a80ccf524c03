"""Width maps of known networks, chosen by class name: no model library is imported.

``find_width_map`` knows timm's ``VisionTransformer`` and the Llama, Mistral, Qwen2, Gemma (1 to 3, text), BERT, RoBERTa, ViT
and GPT-2 families of transformers. Rotary embeddings turn pairs of coordinates within a head, so ``head_dim`` never changes:
attention grows by whole heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.width_map import Layer, Norm, Scale, WidthMap

_HEADS = {name: Layer(input="width") for name in ("score", "classifier", "qa_outputs")}

_CONFIG = {"hidden_size": "width", "num_attention_heads": "heads", "intermediate_size": "ffn"}


def _sizes(config: Any) -> dict[str, int]:
    """Sizes that a configuration of encoders notes; its heads span the width."""
    return {
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "ffn": config.intermediate_size,
    }


def vision_transformer(network: Any) -> WidthMap:
    """``VisionTransformer`` of timm: pre-LN, fused qkv, LayerScale and packed SwiGLU where present.

    Variants with normalisation inside attention or MLP, gated attention or attention pooling are not known.
    """
    block = network.blocks[0]
    packed = "2 " if block.mlp.fc1.out_features == 2 * block.mlp.fc2.in_features else ""
    return WidthMap(
        sizes={
            "width": network.embed_dim,
            "heads": block.attn.num_heads,
            "head_dim": block.attn.head_dim,
            "ffn": block.mlp.fc2.in_features,
        },
        layers={
            "patch_embed.proj": Layer(output="width"),
            "norm_pre": Norm(post=True),
            "blocks.*.norm[12]": Norm(),
            "blocks.*.attn.qkv": Layer("width", "3 heads head_dim"),
            "blocks.*.attn.[qk]_norm": None,
            "blocks.*.attn.proj": Layer("heads head_dim", "width"),
            "blocks.*.mlp.fc1": Layer("width", f"{packed}ffn"),
            "blocks.*.mlp.fc2": Layer("ffn", "width"),
            "blocks.*.ls1": Scale(of="attn.proj"),
            "blocks.*.ls2": Scale(of="mlp.fc2"),
            "norm": Norm(),
            "fc_norm": Norm(),
            "head": Layer(input="width"),
            "head_dist": Layer(input="width"),
        },
        tensors=dict.fromkeys(("cls_token", "reg_token", "dist_token", "pos_embed"), ("", "", "width")),
        attributes={
            "": {"embed_dim": "width", "num_features": "width", "head_hidden_size": "width"},
            "blocks.*.attn": {"num_heads": "heads", "attn_dim": "heads head_dim"},
        },
        demand="span",
    )


def llama(network: Any) -> WidthMap:
    """``transformers`` Llama, Mistral or Qwen2, with any head: RMSNorm, grouped queries, gated MLP, embeddings tied or not.

    Query heads are counted within the group of their key-value head: more key-value heads and larger groups both keep old query
    heads with their old keys. A configuration that notes no size of heads (Qwen2) builds heads that span the width.
    """
    config = network.config
    head_dim = getattr(config, "head_dim", None)
    return WidthMap(
        sizes={
            "width": config.hidden_size,
            "kv_heads": config.num_key_value_heads,
            "groups": config.num_attention_heads // config.num_key_value_heads,
            "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
            "ffn": config.intermediate_size,
        },
        layers={
            "*embed_tokens": Layer(output="width"),
            "*layers.*layernorm": Norm(),
            "*layers.*.q_proj": Layer("width", "kv_heads groups head_dim"),
            "*layers.*.[kv]_proj": Layer("width", "kv_heads head_dim"),
            "*layers.*.o_proj": Layer("kv_heads groups head_dim", "width"),
            "*layers.*.gate_proj": Layer("width", "ffn"),
            "*layers.*.up_proj": Layer("width", "ffn"),
            "*layers.*.down_proj": Layer("ffn", "width"),
            "*norm": Norm(before="lm_head"),
            "lm_head": Layer(input="width"),
            **_HEADS,
        },
        attributes={
            "*layers.*.self_attn": {"num_key_value_groups": "groups"},
            "*layers.*.mlp": {"hidden_size": "width", "intermediate_size": "ffn"},
            "*layers.*": {"hidden_size": "width"},
        },
        config={
            "hidden_size": "width",
            "num_attention_heads": "kv_heads groups",
            "num_key_value_heads": "kv_heads",
            "intermediate_size": "ffn",
        },
        eps_config="rms_norm_eps",
        demand="divide" if head_dim else "span",
    )


def gemma(network: Any) -> WidthMap:
    """``transformers`` Gemma, Gemma 2 or Gemma 3 (text), with any head: Llama with other norms and scaled embeddings.

    Norms add 1 to their weight, and embeddings are multiplied by the root of the width. Gemma 2 and 3 normalise what attention
    and MLP return, too, and Gemma 3 queries and keys. What scores are divided by and caps on them are no sizes, so they stay.
    """
    like = llama(network)
    later = hasattr(network.config, "query_pre_attn_scalar")  # in Gemma, post_attention_layernorm stands before the MLP
    return replace(
        like,
        layers={
            "*layers.*.q_norm": Norm("head_dim", of="q_proj", offset=1.0),
            "*layers.*.k_norm": Norm("head_dim", of="k_proj", offset=1.0),
            "*layers.*.post_*_layernorm": Norm(post=later, offset=1.0),
            **{name: replace(kind, offset=1.0) if isinstance(kind, Norm) else kind for name, kind in like.layers.items()},
            "*embed_tokens": Layer(output="width", root="embed_scale"),
        },
        attributes={
            **like.attributes,
            "*embed_tokens": {"embed_scale": "root width", "scalar_embed_scale": "root width"},
        },
        demand="divide" if later else "",
    )


def bert(network: Any) -> WidthMap:
    """``transformers`` BERT or RoBERTa, any of their heads; post-LN: normalisations write the stream. No cross-attention."""
    config = network.config
    return WidthMap(
        sizes=_sizes(config),
        layers={
            "*embeddings.*_embeddings": Layer(output="width"),
            "*.attention.self.query": Layer("width", "heads head_dim"),
            "*.attention.self.key": Layer("width", "heads head_dim"),
            "*.attention.self.value": Layer("width", "heads head_dim"),
            "*.attention.output.dense": Layer("heads head_dim", "width"),
            "*.intermediate.dense": Layer("width", "ffn"),
            "*layer.*.output.dense": Layer("ffn", "width"),
            "*pooler.dense": Layer("width", "width"),
            "cls.predictions.transform.dense": Layer("width", "width"),
            "cls.predictions.transform.LayerNorm": Norm(before="cls.predictions.decoder"),
            "cls.predictions.decoder": Layer(input="width"),
            "cls.seq_relationship": Layer(input="width"),
            "lm_head.dense": Layer("width", "width"),
            "lm_head.layer_norm": Norm(before="lm_head.decoder"),
            "lm_head.decoder": Layer(input="width"),
            "classifier.dense": Layer("width", "width"),
            "classifier.out_proj": Layer(input="width"),
            "*LayerNorm": Norm(post=True),
            **_HEADS,
        },
        tensors={"cls.predictions.bias": None, "lm_head.bias": None},
        attributes={"*.attention.self": {"num_attention_heads": "heads", "all_head_size": "heads head_dim"}},
        config=_CONFIG,
        eps_config="layer_norm_eps",
        demand="span",
    )


def hugging_face_vit(network: Any) -> WidthMap:
    """``transformers`` ViT, with or without a classifier: pre-LN, one layer each for queries, keys and values."""
    config = network.config
    return WidthMap(
        sizes=_sizes(config),
        layers={
            "*embeddings.patch_embeddings.projection": Layer(output="width"),
            "*layers.*.layernorm_*": Norm(),
            "*layers.*.attention.[qkv]_proj": Layer("width", "heads head_dim"),
            "*layers.*.attention.o_proj": Layer("heads head_dim", "width"),
            "*layers.*.mlp.fc1": Layer("width", "ffn"),
            "*layers.*.mlp.fc2": Layer("ffn", "width"),
            "*layernorm": Norm(),
            "classifier": Layer(input="width"),
        },
        tensors=dict.fromkeys(
            ("*embeddings.cls_token", "*embeddings.mask_token", "*embeddings.position_embeddings"), ("", "", "width")
        ),
        attributes={"*layers.*.attention": {"num_attention_heads": "heads"}},
        config=_CONFIG,
        eps_config="layer_norm_eps",
        demand="span",
    )


def gpt2(network: Any) -> WidthMap:
    """``transformers`` GPT-2 with a language-modelling, classification or question-answering head; no cross-attention."""
    config = network.config
    hidden = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    return WidthMap(
        sizes={
            "width": config.n_embd,
            "heads": config.n_head,
            "head_dim": config.n_embd // config.n_head,
            "ffn": hidden,
        },
        layers={
            "*wte": Layer(output="width"),
            "*wpe": Layer(output="width"),
            "*h.*.ln_[12]": Norm(),
            "*h.*.attn.c_attn": Layer("width", "3 heads head_dim"),
            "*h.*.attn.c_proj": Layer("heads head_dim", "width"),
            "*h.*.mlp.c_fc": Layer("width", "ffn"),
            "*h.*.mlp.c_proj": Layer("ffn", "width"),
            "*ln_f": Norm(before="lm_head"),
            "lm_head": Layer(input="width"),
            **_HEADS,
        },
        attributes={
            "*h.*.attn": {"num_heads": "heads", "embed_dim": "width", "split_size": "heads head_dim"},
            "": {"embed_dim": "width"},
            "transformer": {"embed_dim": "width"},
        },
        config={"n_embd": "width", "n_head": "heads", "n_inner": "ffn"},
        eps_config="layer_norm_epsilon",
        demand="span",
    )


FAMILIES: dict[str, Callable[[Any], WidthMap]] = {
    "VisionTransformer": vision_transformer,
    "LlamaPreTrainedModel": llama,
    "MistralPreTrainedModel": llama,
    "Qwen2PreTrainedModel": llama,
    "GemmaPreTrainedModel": gemma,
    "Gemma2PreTrainedModel": gemma,
    "Gemma3PreTrainedModel": gemma,
    "BertPreTrainedModel": bert,
    "RobertaPreTrainedModel": bert,
    "ViTPreTrainedModel": hugging_face_vit,
    "GPT2PreTrainedModel": gpt2,
}


def find_width_map(network: nn.Module) -> WidthMap:
    """Declare a known network.

    Args:
        network: The network; subclasses of known classes are known.

    Returns:
        Its width map.

    Raises:
        MisconfigurationException: No base of its class is known.
    """
    for base in type(network).__mro__:
        if base.__name__ in FAMILIES:
            try:
                return FAMILIES[base.__name__](network)
            except AttributeError as error:  # a variant with other layers
                raise MisconfigurationException(
                    f"This {type(network).__name__} has an unknown structure ({error}). Give width_map=WidthMap(...)."
                ) from error
    raise MisconfigurationException(
        f"The library does not know how to widen a {type(network).__name__}; it knows {', '.join(FAMILIES)}. Give "
        "width_map=WidthMap(sizes=..., layers=...) from lightning_peft.structure.width_map, in which every layer says which "
        "axes it reads and writes."
    )

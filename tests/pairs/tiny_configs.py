"""Tiny configurations of transformers' families: sizes by the names that configurations use, and what single ones need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, LAYERS, VOCABULARY, POSITIONS, SIDE = 32, 4, 2, 8, 48, 4, 64, 64, 32

# The first pattern that fits a key of a configuration says its size; keys that none fits keep their defaults.
SIZES: dict[str, Any] = {
    r"vocab_size|tgt_vocab_size|src_vocab_size|n_vocab|vocab_size_per_layer_input|decoder_vocab_size": VOCABULARY,
    r"num_labels": 5,
    r"hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|dim|model_dim|encoder_width|decoder_hidden_size": WIDTH,
    r"hidden_dim|lm_head_dim|block_dim|attention_hidden_size|lru_width|ssm_width|conv_dim|projection_dim|proj_size": WIDTH,
    r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(encoder|decoder)_layers|depth": LAYERS,
    r"num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|num_query_heads|linear_num_value_heads": HEADS,
    r"num_(encoder|decoder)_attention_heads|attention_heads|num_swa_attention_heads": HEADS,
    r"num_key_value_heads|n_head_kv|num_kv_heads|linear_num_key_heads|kv_n_heads|multi_query_group_num": KV_HEADS,
    r"head_dim|d_kv|attention_head_dim|linear_(key|value)_head_dim|v_head_dim|swa_head_dim|global_head_dim": HEAD,
    r"qk_rope_head_dim|qk_nope_head_dim": HEAD // 2,
    r"(q|kv|o)_lora_rank|kv_channels": HEAD,
    r"intermediate_size|ffn_dim|d_ff|n_inner|(encoder|decoder)_ffn_dim|ffn_hidden_size|ffn_hidden_dim|dim_feedforward": HIDDEN,
    r"inner_size|d_inner|hidden_dim_ffn|intermediate_size_mlp|dense_intermediate_size|block_ff_dim": HIDDEN,
    r"(shared_)?(moe|expert|experts)_intermediate_size|shared_intermediate_size|moe_ffn_hidden_size|expert_ffn_hidden_size": 16,
    r"moe_shared_expert_intermediate_size|shared_expert_intermediate_size": 16,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts_total": 4,
    r"num_experts_per_tok|moe_top_k|moe_topk|num_selected_experts|experts_per_token|top_k_experts": 2,
    r"n_group|topk_group|num_expert_group|n_shared_experts": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len|seq_length": POSITIONS,
    r"max_(encoder|decoder)_position_embeddings|max_sequence_length": POSITIONS,
    r"sliding_window|attention_window_size|attention_chunk_size|local_attention|window_size|index_topk": 8,
    r"mamba_d_state|state_size|ssm_state_size|d_state": 8,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"mamba_d_head|mamba_head_dim|mamba_headdim": 8,
    r"mamba_n_groups|n_groups|mamba_ngroups": 1,
    r"mamba_d_ssm": 64,
    r"mamba_chunk_size|chunk_size": 8,
    r"mamba_expand|expand": 2,
    r"time_step_rank|mamba_dt_rank": 4,
    r"image_size": SIDE,
    r"patch_size": 8,
    r"pad_token_id": 0,
    r"bos_token_id|decoder_start_token_id|cls_token_id": 1,
    r"eos_token_id|sep_token_id": 2,
    r"scale_embedding": False,
    r"max_source_length|encoder_stride": 8,
    r"num_mel_bins": 16,
    r"conv_dim_list": (WIDTH,) * 2,
}
_PATTERNS = [(re.compile(pattern), value) for pattern, value in SIZES.items()]

# What a family needs beside its sizes, by type of model.
OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "num_groups": 4},
    "convnext": {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 3, 1]},
    "convnextv2": {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 3, 1]},
    "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 4]},
    "donut-swin": {"embed_dim": 12, "depths": [2, 2], "num_heads": [3, 3], "window_size": 4, "patch_size": 4},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 1280, "image_size": 64},
    "focalnet": {"embed_dim": 8, "depths": [1, 1, 3, 1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hgnet_v2": {"image_size": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "levit": {"image_size": 224},
    "mobilevit": {"image_size": 64},
    "mobilevitv2": {"image_size": 256},
    "nemotron_h": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "poolformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 3, 1]},
    "pvt_v2": {"hidden_sizes": [8, 16, 32, 32], "num_attention_heads": [1, 2, 4, 4], "depths": [1, 1, 3, 1]},
    "regnet": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 3, 1], "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 3, 1], "layer_type": "basic"},
    "segformer": {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 3, 1], "num_attention_heads": [1, 2, 4, 4]},
    "swin": {"embed_dim": 12, "depths": [2, 4], "num_heads": [3, 3], "window_size": 2, "patch_size": 2},
    "swinv2": {"embed_dim": 12, "depths": [2, 4], "num_heads": [3, 3], "window_size": 2, "patch_size": 2},
}


def tiny(config_class: Any, overrides: Mapping[str, Any] | None = None) -> Any:
    """Return a small configuration without dropout.

    Args:
        config_class: The class.
        overrides: What it needs beside; by the name of an inner configuration that one's.
    """
    overrides = dict(overrides or {})
    inner = dict(getattr(config_class, "sub_configs", None) or {})
    settings: dict[str, Any] = {}
    for key, value in config_class().to_dict().items():
        if key in inner:
            continue
        found = _size(key, value)
        if found is not None:
            settings[key] = found
    for name, kind in inner.items():
        if hasattr(kind, "model_type") and kind.__name__ != "AutoConfig":
            settings[name] = tiny(kind, overrides.pop(name, None)).to_dict()
    return config_class(**{**settings, **overrides})


def _size(key: str, value: Any) -> Any:
    if isinstance(value, float) and ("dropout" in key or "drop" in key):
        return 0.0
    if isinstance(value, (list, tuple, dict)) or (isinstance(value, bool) and key != "scale_embedding"):
        return None
    return next((size for pattern, size in _PATTERNS if pattern.fullmatch(key)), None)

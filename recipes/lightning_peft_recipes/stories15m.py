"""The story Llama of 15 million weights, from the file of llama2.c into transformers, with its tokenizer."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_peft.assets import derived, open_member
from lightning_peft_recipes.assets import STORIES15M

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

_MEMBER = "package/src/llama2.data"
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = 256  # tokens of single bytes, behind the special ones


class _Sizes(NamedTuple):
    """The head of the file: seven integers."""

    width: int
    ffn: int
    depth: int
    heads: int
    kv_heads: int
    vocab_size: int
    context: int


_HEAD = struct.calcsize("<7i")


def stories_llama() -> LlamaForCausalLM:
    """The network with its weights; embedding and head are one tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = open_member(STORIES15M, _MEMBER).getvalue()
    sizes = _sizes(data)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            intermediate_size=sizes.ffn,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=sizes.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.load_state_dict(_state(data, sizes))
    return model


def stories_tokenizer() -> Tokenizer:
    """The tokenizer of Llama 2, as the file has it; it writes no special tokens of its own."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(derived(STORIES15M, "tokenizer.json", _unpack_tokenizer)))


def _sizes(data: bytes) -> _Sizes:
    return _Sizes(*struct.unpack_from("<7i", data))


def _shapes(sizes: _Sizes) -> dict[str, tuple[int, ...]]:
    """Names in transformers and shapes of what the file holds, in its order; layers are stacked."""
    depth, width, ffn = sizes.depth, sizes.width, sizes.ffn
    kv_width = width // sizes.heads * sizes.kv_heads
    return {
        "model.embed_tokens.weight": (sizes.vocab_size, width),
        "model.layers.*.input_layernorm.weight": (depth, width),
        "model.layers.*.self_attn.q_proj.weight": (depth, width, width),
        "model.layers.*.self_attn.k_proj.weight": (depth, kv_width, width),
        "model.layers.*.self_attn.v_proj.weight": (depth, kv_width, width),
        "model.layers.*.self_attn.o_proj.weight": (depth, width, width),
        "model.layers.*.post_attention_layernorm.weight": (depth, width),
        "model.layers.*.mlp.gate_proj.weight": (depth, ffn, width),
        "model.layers.*.mlp.down_proj.weight": (depth, width, ffn),
        "model.layers.*.mlp.up_proj.weight": (depth, ffn, width),
        "model.norm.weight": (width,),
        "cosines": (sizes.context, width // sizes.heads // 2),
        "sines": (sizes.context, width // sizes.heads // 2),
    }


def _state(data: bytes, sizes: _Sizes) -> dict[str, Tensor]:
    state, offset = {}, _HEAD
    for name, shape in _shapes(sizes).items():
        count = math.prod(shape)
        value = torch.frombuffer(bytearray(data[offset : offset + 4 * count]), dtype=torch.float32).view(shape)
        offset += 4 * count
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = torch.stack([_halves_turned(each, sizes.width // sizes.heads) for each in value])
        stacked = {name.replace("*", str(layer)): each for layer, each in enumerate(value)}
        state |= stacked if "*" in name else {name: value}
    del state["cosines"], state["sines"]  # of the positions, which transformers computes
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def _halves_turned(weight: Tensor, head_width: int) -> Tensor:
    """Order the rows of each head for rotary positions that turn its halves; llama2.c turns neighbours."""
    rows, inputs = weight.shape
    return weight.view(rows // head_width, head_width // 2, 2, inputs).transpose(1, 2).reshape(rows, inputs)


def _unpack_tokenizer(path: Path) -> None:
    data = open_member(STORIES15M, _MEMBER).getvalue()
    sizes = _sizes(data)
    weights = sum(math.prod(shape) for shape in _shapes(sizes).values())
    tokenizer_from_scores(_pieces(data[_HEAD + 4 * weights :], sizes.vocab_size)).save(str(path))


def _pieces(data: bytes, count: int) -> list[tuple[bytes, float]]:
    """Text and score of every token of a ``tokenizer.bin``: the longest length, then score, length and text of each."""
    pieces, offset = [], struct.calcsize("<i")
    for _ in range(count):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += struct.calcsize("<fi")
        pieces.append((data[offset : offset + length], score))
        offset += length
    return pieces


def tokenizer_from_scores(pieces: list[tuple[bytes, float]]) -> Tokenizer:
    """Make BPE with the merges that scores mean: the neighbours whose union scores highest are joined first.

    Args:
        pieces: Text and score of every token by its id: the special ones, 256 bytes, then what is joined.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    names = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(_BYTES))]
    names += [text.decode().replace(" ", "▁") for text, _ in pieces[len(names) :]]
    ids: dict[str, int] = {}
    for index, name in enumerate(names):
        ids.setdefault(name, index)
    merges = []
    for name, index in ids.items():
        splits = [(name[:cut], name[cut:]) for cut in range(1, len(name))] if index >= len(_SPECIAL) + _BYTES else []
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += [(index, pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    merges.sort(key=lambda merge: -pieces[merge[0]][1])
    bpe = models.BPE(ids, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer

"""Which tensors a config asks for, under Hugging Face's names, and what GGUF calls them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from modelfiles.config import Architecture, ModelConfig
from modelfiles.config_gguf import ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT, ROPE_FREQS
from modelfiles.errors import WeightsMismatch

LM_HEAD = "lm_head.weight"

_GGUF_TO_HF_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": LM_HEAD,
}
_GGUF_TO_HF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IN_THE_CONFIG = {ROPE_FREQS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT}
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
_SHOWN = 5


def hugging_face_name(gguf_name: str) -> str | None:
    """The name in a Hugging Face checkpoint; None for tensors that became part of the config.

    A name that we do not know is returned as it is, so that it shows up as unexpected.
    """
    if gguf_name in _IN_THE_CONFIG:
        return None
    match = _GGUF_LAYER.fullmatch(gguf_name)
    if match is None:
        return _GGUF_TO_HF_GLOBAL.get(gguf_name, gguf_name)
    layer, part, kind = match.groups()
    return f"model.layers.{layer}.{_GGUF_TO_HF_LAYER[part]}.{kind}" if part in _GGUF_TO_HF_LAYER else gguf_name


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model has."""
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes.update((prefix + name, shape) for name, shape in _layer_tensors(config))
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = vocabulary
    return shapes


def permuted_heads(config: ModelConfig, name: str) -> int | None:
    """Heads whose rows llama.cpp reordered in a GGUF file (Llama's q and k only: its RoPE pairs neighbours)."""
    if config.architecture is not Architecture.LLAMA:
        return None
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_heads
    return config.num_kv_heads if name.endswith("self_attn.k_proj.weight") else None


def check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises WeightsMismatch unless every expected tensor is there, in its shape, and no other."""
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise WeightsMismatch(f"{where} lacks {_listed(missing)}; the checkpoint is incomplete: fetch it again")
    extra = [name for name in found if name not in expected and not _ignorable(config, name)]
    if extra:
        raise WeightsMismatch(f"{where} has unexpected {_listed(extra)}; its config describes another model")
    wrong = [f"{name} {found[name]} instead of {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise WeightsMismatch(f"{where}: wrong shapes: {_listed(wrong)}; weights and config belong to different models")


def _layer_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    for name, rows in (("q", query), ("k", key_value), ("v", key_value)):
        yield f"self_attn.{name}_proj.weight", (rows, hidden)
        if config.attention_bias:
            yield f"self_attn.{name}_proj.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, query)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _ignorable(config: ModelConfig, name: str) -> bool:
    """Tied checkpoints may carry a copy of the embedding; old ones carry RoPE's frequencies."""
    return (name == LM_HEAD and config.tie_word_embeddings) or _DERIVED.fullmatch(name) is not None


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

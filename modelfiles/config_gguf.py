"""ModelConfig from GGUF metadata (keys of llama.cpp's `gguf-py/gguf/constants.py`)."""

from __future__ import annotations

import struct

from modelfiles.config import Architecture, ModelConfig, RopeScaling, RopeType
from modelfiles.errors import MalformedModel, UnsupportedModel
from modelfiles.gguf_file import GgufFile, TensorType, read_gguf
from modelfiles.layout import GgufModel

ROPE_FREQS = "rope_freqs.weight"
ROPE_FACTORS_LONG = "rope_factors_long.weight"
ROPE_FACTORS_SHORT = "rope_factors_short.weight"
OUTPUT = "output.weight"

_DEFAULT_ROPE_THETA = 10_000.0
_END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_UNSUPPORTED_IF_POSITIVE = ("expert_count", "attention.sliding_window", "attention.max_alibi_bias")


def load(model: GgufModel) -> ModelConfig:
    return from_gguf(read_gguf(model.path))


def from_gguf(file: GgufFile) -> ModelConfig:
    architecture = _architecture(file)
    keys = _Keys(file, architecture)
    _refuse_unsupported(keys)
    hidden_size, num_heads = keys.positive("embedding_length"), keys.positive("attention.head_count")
    num_kv_heads = keys.positive("attention.head_count_kv", default=num_heads)
    head_dim = keys.positive("attention.key_length", default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise MalformedModel(f"{file.path}: {num_heads} heads cannot share {num_kv_heads} KV heads")
    _refuse_odd_heads(keys, head_dim)
    max_positions = keys.positive("context_length")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_vocab_size(keys),
        hidden_size=hidden_size,
        intermediate_size=keys.positive("feed_forward_length"),
        num_layers=keys.positive("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_shortest_float32(keys.required_float("attention.layer_norm_rms_epsilon")),
        rope_theta=keys.optional_float("rope.freq_base") or _DEFAULT_ROPE_THETA,
        rope_scaling=_rope_scaling(keys, max_positions, head_dim),
        max_position_embeddings=max_positions,
        tie_word_embeddings=OUTPUT not in file.tensors,
        attention_bias=architecture is Architecture.QWEN2,
        qk_norm=architecture is Architecture.QWEN3,
        eos_token_ids=_end_token_ids(file),
        bos_token_id=file.get_int("tokenizer.ggml.bos_token_id"),
        pad_token_id=file.get_int("tokenizer.ggml.padding_token_id"),
        dtype=_dtype(file),
    )


class _Keys:
    """The keys below an architecture's prefix."""

    def __init__(self, file: GgufFile, architecture: Architecture) -> None:
        self.file = file
        self.prefix = architecture.value

    def name(self, key: str) -> str:
        return f"{self.prefix}.{key}"

    def optional_int(self, key: str) -> int | None:
        return self.file.get_int(self.name(key))

    def optional_float(self, key: str) -> float | None:
        return self.file.get_float(self.name(key))

    def positive(self, key: str, default: int | None = None) -> int:
        if self.file.array_length(self.name(key)) is not None:
            raise UnsupportedModel(f"{self.file.path}: {self.name(key)} differs per layer, which is not supported")
        value = self.optional_int(key)
        if value is None:
            value = default
        if value is None or value <= 0:
            raise MalformedModel(f"{self.file.path}: {self.name(key)} should be a positive number, not {value!r}")
        return value

    def required_float(self, key: str) -> float:
        value = self.optional_float(key)
        if value is None:
            raise MalformedModel(f"{self.file.path}: {self.name(key)} is missing")
        return value


def _architecture(file: GgufFile) -> Architecture:
    name = file.get_str("general.architecture")
    known = ", ".join(entry.value for entry in Architecture)
    if name is None:
        raise MalformedModel(f"{file.path}: general.architecture is missing (known: {known})")
    try:
        return Architecture(name)
    except ValueError as error:
        raise UnsupportedModel(f"architecture {name!r} of {file.path} is not supported (known: {known})") from error


def _refuse_unsupported(keys: _Keys) -> None:
    for key in _UNSUPPORTED_IF_POSITIVE:
        value = keys.optional_float(key)
        if value:
            raise UnsupportedModel(f"{keys.file.path}: {keys.name(key)} = {value:g} is not supported")
    kind = keys.file.get_str("general.type")
    if kind not in (None, "model"):
        raise UnsupportedModel(f"{keys.file.path} holds a {kind!r}, not a model")


def _refuse_odd_heads(keys: _Keys, head_dim: int) -> None:
    value_dim = keys.optional_int("attention.value_length")
    if value_dim not in (None, head_dim):
        raise UnsupportedModel(f"{keys.file.path}: value heads of {value_dim} beside key heads of {head_dim}")
    rotary_dim = keys.optional_int("rope.dimension_count")
    if rotary_dim not in (None, head_dim):
        raise UnsupportedModel(f"{keys.file.path}: rope over {rotary_dim} of {head_dim} dimensions is not supported")


def _vocab_size(keys: _Keys) -> int:
    """The embedding's rows are what the model computes with; the token list may be shorter (padding)."""
    embedding = keys.file.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    return keys.positive("vocab_size", default=keys.file.array_length("tokenizer.ggml.tokens"))


def _rope_scaling(keys: _Keys, max_positions: int, head_dim: int) -> RopeScaling | None:
    factors = _read_factors(keys.file, ROPE_FREQS, head_dim)
    if factors is not None:
        return RopeScaling(RopeType.FREQUENCY_FACTORS, frequency_factors=factors)
    name = keys.file.get_str(keys.name("rope.scaling.type")) or "none"
    original = keys.optional_int("rope.scaling.original_context_length") or max_positions
    short_factor = _read_factors(keys.file, ROPE_FACTORS_SHORT, head_dim)
    long_factor = _read_factors(keys.file, ROPE_FACTORS_LONG, head_dim)
    if name == RopeType.LONGROPE.value or (short_factor and long_factor):
        if short_factor is None or long_factor is None:
            raise MalformedModel(f"{keys.file.path}: longrope needs {ROPE_FACTORS_SHORT} and {ROPE_FACTORS_LONG}")
        return RopeScaling(
            RopeType.LONGROPE,
            factor=max_positions / original,
            original_max_position_embeddings=original,
            attention_factor=keys.optional_float("rope.scaling.attn_factor"),
            short_factor=short_factor,
            long_factor=long_factor,
        )
    if name == "none":
        return None
    factor = keys.required_float("rope.scaling.factor")
    if name == "linear":
        return RopeScaling(RopeType.LINEAR, factor=factor, original_max_position_embeddings=original)
    if name == "yarn":
        return _yarn(keys, factor, original)
    raise UnsupportedModel(f"{keys.file.path}: rope scaling {name!r} is not supported (known: linear, yarn, longrope)")


def _yarn(keys: _Keys, factor: float, original: int) -> RopeScaling:
    if keys.optional_float("rope.scaling.yarn_log_multiplier"):
        raise UnsupportedModel(f"{keys.file.path}: {keys.name('rope.scaling.yarn_log_multiplier')} is not supported")
    return RopeScaling(
        RopeType.YARN,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=keys.optional_float("rope.scaling.attn_factor"),
        beta_fast=keys.optional_float("rope.scaling.yarn_beta_fast") or 32.0,
        beta_slow=keys.optional_float("rope.scaling.yarn_beta_slow") or 1.0,
    )


def _read_factors(file: GgufFile, name: str, head_dim: int) -> tuple[float, ...] | None:
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.shape != (head_dim // 2,) or tensor.tensor_type is not TensorType.F32:
        raise MalformedModel(f"{file.path}: {name} should be {head_dim // 2} numbers of F32, not {tensor.shape}")
    return struct.unpack(f"<{head_dim // 2}f", file.tensor_bytes(name))


def _end_token_ids(file: GgufFile) -> tuple[int, ...]:
    ids = (file.get_int(f"tokenizer.ggml.{key}") for key in _END_TOKEN_KEYS)
    return tuple(dict.fromkeys(entry for entry in ids if entry is not None))


def _dtype(file: GgufFile) -> str:
    """The matrices' element type where they have one that torch knows; quantised files become float32."""
    matrices = {tensor.type_number for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if matrices == {int(TensorType.F16)}:
        return "float16"
    if matrices == {int(TensorType.BF16)}:
        return "bfloat16"
    return "float32"


def _shortest_float32(value: float) -> float:
    """1e-5 was rounded to float32 in the file; give back the decimal that its author wrote."""
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return value

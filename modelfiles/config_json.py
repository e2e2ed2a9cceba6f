"""ModelConfig from a Hugging Face config.json and generation_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

from modelfiles.config import Architecture, GenerationDefaults, ModelConfig, RopeScaling, RopeType
from modelfiles.errors import MalformedModel, UnsupportedModel
from modelfiles.layout import HuggingFaceFolder, JsonObject

Number: TypeAlias = int | float

_DEFAULT_ROPE_THETA = 10_000.0
_UNSUPPORTED_IF_TRUE = ("mlp_bias", "use_sliding_window", "is_encoder_decoder", "add_cross_attention")
_UNSUPPORTED_IF_SET = ("quantization_config", "num_experts", "num_local_experts", "moe_intermediate_size")


def load(folder: HuggingFaceFolder) -> ModelConfig:
    fields = _read(folder, "config.json")
    if fields is None:
        raise MalformedModel(f"{folder.path} has no config.json")
    architecture = _architecture(fields)
    _refuse_unsupported(fields, architecture)
    hidden_size, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    num_kv_heads = fields.positive("num_key_value_heads", default=num_heads)
    default_head_dim = 128 if architecture is Architecture.QWEN3 else hidden_size // num_heads
    head_dim = fields.positive("head_dim", default=default_head_dim)
    if num_heads % num_kv_heads:
        raise MalformedModel(f"{fields.where}: {num_heads} heads cannot share {num_kv_heads} KV heads")
    max_positions = fields.positive("max_position_embeddings")
    generation = _read(folder, "generation_config.json") or _Fields("generation_config.json", {})
    rope_theta, rope_scaling = _rope(fields, max_positions, head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=fields.positive("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(fields.number("rms_norm_eps", default=1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=architecture is Architecture.QWEN2,
        qk_norm=architecture is Architecture.QWEN3,
        # generation_config.json wins: chat models list their end-of-turn ids only there
        eos_token_ids=generation.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        bos_token_id=_first(fields.token_ids("bos_token_id") or generation.token_ids("bos_token_id")),
        pad_token_id=_first(fields.token_ids("pad_token_id") or generation.token_ids("pad_token_id")),
        generation=_generation_defaults(generation),
        dtype=_dtype(fields),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a JSON object; every complaint names file, field and value."""

    where: str
    values: JsonObject

    def number(self, name: str, default: Number | None = None) -> Number:
        value = self.optional_number(name)
        if value is None:
            value = default
        if value is None:
            raise MalformedModel(f"{self.where}: {name} is missing")
        return value

    def optional_number(self, name: str) -> Number | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MalformedModel(f"{self.where}: {name} should be a number, not {value!r}")
        return value

    def optional_float(self, name: str) -> float | None:
        value = self.optional_number(name)
        return None if value is None else float(value)

    def optional_int(self, name: str) -> int | None:
        value = self.optional_number(name)
        return None if value is None else int(value)

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int) or value <= 0:
            raise MalformedModel(f"{self.where}: {name} should be a positive whole number, not {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise MalformedModel(f"{self.where}: {name} should be true or false, not {value!r}")
        return value

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is None or isinstance(value, str):
            return value
        raise MalformedModel(f"{self.where}: {name} should be a string, not {value!r}")

    def floats(self, name: str) -> tuple[float, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise MalformedModel(f"{self.where}: {name} should be a list of numbers")
        return tuple(float(cast(Number, entry)) for entry in cast(list[object], value))

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids, or none."""
        value = self.values.get(name)
        if value is None:
            return ()
        ids = cast(list[object], value) if isinstance(value, list) else [value]
        if not all(isinstance(entry, int) for entry in ids):
            raise MalformedModel(f"{self.where}: {name} should be a token id or a list of them, not {value!r}")
        return tuple(cast(list[int], ids))

    def inner(self, name: str) -> _Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise MalformedModel(f"{self.where}: {name} should be an object")
        return _Fields(f"{self.where}: {name}", cast(JsonObject, value))


def _read(folder: HuggingFaceFolder, name: str) -> _Fields | None:
    values = folder.read_json(name)
    return None if values is None else _Fields(str(folder.path / name), values)


def _architecture(fields: _Fields) -> Architecture:
    name = fields.text("model_type")
    known = ", ".join(entry.value for entry in Architecture)
    if name is None:
        raise MalformedModel(f"{fields.where}: model_type is missing (known: {known})")
    try:
        return Architecture(name)
    except ValueError as error:
        raise UnsupportedModel(f"architecture {name!r} of {fields.where} is not supported (known: {known})") from error


def _refuse_unsupported(fields: _Fields, architecture: Architecture) -> None:
    for name in _UNSUPPORTED_IF_TRUE:
        if fields.flag(name, default=False):
            raise UnsupportedModel(f"{fields.where}: {name} is not supported")
    for name in _UNSUPPORTED_IF_SET:
        if fields.values.get(name):
            raise UnsupportedModel(f"{fields.where}: {name} is not supported: {fields.values[name]!r}")
    if architecture is not Architecture.QWEN2 and fields.flag("attention_bias", default=False):
        raise UnsupportedModel(f"{fields.where}: attention_bias is not supported for {architecture.value}")
    activation = fields.text("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"{fields.where}: hidden_act {activation!r} is not supported (supported: silu)")
    layer_types = cast(list[object], fields.values.get("layer_types") or [])
    others = {entry for entry in layer_types if entry != "full_attention"}
    if others:
        raise UnsupportedModel(f"{fields.where}: layer_types {sorted(map(str, others))} are not supported")


def _rope(fields: _Fields, max_positions: int, head_dim: int) -> tuple[float, RopeScaling | None]:
    """transformers 5 writes all of it under rope_parameters; before, rope_theta stood beside rope_scaling."""
    nested = fields.inner("rope_parameters") or fields.inner("rope_scaling")
    theta = fields.optional_float("rope_theta")
    if nested is None:
        _refuse_partial_rotary(fields)
        return theta or _DEFAULT_ROPE_THETA, None
    theta = nested.optional_float("rope_theta") or theta or _DEFAULT_ROPE_THETA
    _refuse_partial_rotary(fields)
    _refuse_partial_rotary(nested)
    name = nested.text("rope_type") or nested.text("type") or "default"
    if name == "default":
        return theta, None
    return theta, _rope_scaling(fields, nested, name, max_positions, head_dim)


def _refuse_partial_rotary(fields: _Fields) -> None:
    factor = fields.optional_float("partial_rotary_factor")
    if factor is not None and factor != 1.0:
        raise UnsupportedModel(f"{fields.where}: partial_rotary_factor {factor} is not supported")


def _rope_scaling(fields: _Fields, nested: _Fields, name: str, max_positions: int, head_dim: int) -> RopeScaling:
    types = {entry.value for entry in RopeType} - {RopeType.FREQUENCY_FACTORS.value}
    if name not in types:
        raise UnsupportedModel(
            f"{nested.where}: rope type {name!r} is not supported (known: {', '.join(sorted(types))})"
        )
    rope_type = RopeType(name)
    original = nested.optional_int("original_max_position_embeddings") or fields.optional_int(
        "original_max_position_embeddings"
    )
    if rope_type is RopeType.LLAMA3 and original is None:
        raise MalformedModel(f"{nested.where}: original_max_position_embeddings is missing")
    short_factor, long_factor = nested.floats("short_factor"), nested.floats("long_factor")
    if rope_type is RopeType.LONGROPE and {len(short_factor), len(long_factor)} != {head_dim // 2}:
        raise MalformedModel(f"{nested.where}: short_factor and long_factor need {head_dim // 2} entries each")
    # longrope states its factor only through the two lengths, as Phi-3 does
    factor_default = max_positions / (original or max_positions) if rope_type is RopeType.LONGROPE else None
    return RopeScaling(
        rope_type=rope_type,
        factor=float(nested.number("factor", default=factor_default)),
        original_max_position_embeddings=original or max_positions,
        attention_factor=nested.optional_float("attention_factor"),
        beta_fast=nested.optional_float("beta_fast") or 32.0,
        beta_slow=nested.optional_float("beta_slow") or 1.0,
        mscale=nested.optional_float("mscale"),
        mscale_all_dim=nested.optional_float("mscale_all_dim"),
        truncate=nested.flag("truncate", default=True),
        low_freq_factor=float(nested.number("low_freq_factor", default=1.0)),
        high_freq_factor=float(nested.number("high_freq_factor", default=4.0)),
        short_factor=short_factor,
        long_factor=long_factor,
    )


def _generation_defaults(fields: _Fields) -> GenerationDefaults:
    return GenerationDefaults(
        temperature=fields.optional_float("temperature"),
        top_p=fields.optional_float("top_p"),
        top_k=fields.optional_int("top_k"),
        repetition_penalty=fields.optional_float("repetition_penalty"),
        max_new_tokens=fields.optional_int("max_new_tokens"),
        do_sample=fields.flag("do_sample", default=False) if "do_sample" in fields.values else None,
    )


def _dtype(fields: _Fields) -> str:
    """transformers 5 calls it dtype, before torch_dtype."""
    name = fields.text("dtype") or fields.text("torch_dtype") or "float32"
    name = name.removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise UnsupportedModel(f"{fields.where}: dtype {name!r} is not supported (known: float32, float16, bfloat16)")
    return name


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None

"""Configs from config.json and from GGUF metadata, and refusals by name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from modelfiles import Architecture, RopeType, load_config
from modelfiles.errors import MalformedModel, ModelFilesError, ModelNotFound, UnsupportedModel

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


def write(folder: Path, fields: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_a_llama_config_with_rope_theta_beside_rope_scaling_is_read(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LLAMA | {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}}))
    assert config.architecture is Architecture.LLAMA
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.rope_type is RopeType.LLAMA3
    assert config.rope_scaling.original_max_position_embeddings == 2048


def test_both_spellings_of_rope_parameters_give_the_same_config(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = write(
        tmp_path / "old", LLAMA | {"rope_scaling": {"type": "llama3", **LLAMA3_ROPE}, "torch_dtype": "bfloat16"}
    )
    fields = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    nested = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}
    new = write(tmp_path / "new", fields | {"rope_parameters": nested, "dtype": "bfloat16"})
    assert load_config(old) == load_config(new)
    assert load_config(new).dtype == "bfloat16"


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_every_rope_scaling_that_transformers_writes_for_llama_is_read(tmp_path: Path, rope_type: str) -> None:
    from transformers import LlamaConfig

    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type != "linear":
        rope["original_max_position_embeddings"] = 1024
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    LlamaConfig(**{**LLAMA, "rope_parameters": rope}).save_pretrained(tmp_path)
    scaling = load_config(tmp_path).rope_scaling
    assert scaling is not None
    assert (scaling.rope_type.value, scaling.factor) == (rope_type, 4.0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_config_written_by_transformers_agrees_with_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    shape = {name: value for name, value in LLAMA.items() if name not in ("model_type", "rope_theta")}
    theirs = AutoConfig.for_model(family, **shape)
    theirs.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.attention_bias, ours.qk_norm) == (family == "qwen2", family == "qwen3")


def test_an_unknown_architecture_is_refused_by_name_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*known: llama, qwen2, qwen3"):
        load_config(write(tmp_path, LLAMA | {"model_type": "mamba"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("use_sliding_window", True),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"rope_type": "mrope", "factor": 1.0}),
        ("torch_dtype", "float8_e4m3fn"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match="mrope" if field == "rope_scaling" else field.removeprefix("torch_")):
        load_config(write(tmp_path, LLAMA | {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),
        ("num_hidden_layers", 0),
        ("vocab_size", None),
        ("eos_token_id", "two"),
        ("tie_word_embeddings", "yes"),
        ("num_key_value_heads", 3),
        ("rope_scaling", [1]),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path: Path, field: str, value: object) -> None:
    words = "3 KV heads" if field == "num_key_value_heads" else field
    with pytest.raises(MalformedModel, match=words):
        load_config(write(tmp_path, LLAMA | {field: value}))


def test_generation_config_brings_end_tokens_and_sampling_defaults(tmp_path: Path) -> None:
    generation = {"eos_token_id": [7, 8], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}
    config = load_config(write(tmp_path, LLAMA, generation))
    assert config.eos_token_ids == (7, 8)
    defaults = config.generation
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.do_sample) == (0.6, 0.9, 20, True)
    assert defaults.repetition_penalty is None


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MalformedModel, match=r"config\.json is not valid JSON"):
        load_config(tmp_path)


def test_a_path_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="neither"):
        load_config(tmp_path)
    with pytest.raises(ModelNotFound, match="does not exist"):
        load_config(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"no \.gguf"):
        load_config(tmp_path / "model.bin")


def test_two_gguf_files_in_a_folder_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModel, match=r"a\.gguf, b\.gguf"):
        load_config(tmp_path)


def write_gguf(path: Path, architecture: str = "llama", rope_freqs: list[float] | None = None, **extra: Any) -> Path:
    """A header with one tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for key, value in extra.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_metadata_gives_the_same_config_as_config_json(tmp_path: Path) -> None:
    from_gguf = load_config(write_gguf(tmp_path / "m.gguf"))
    fields = LLAMA | {"tie_word_embeddings": True, "eos_token_id": [2, 5]}
    assert from_gguf == load_config(write(tmp_path, fields))


def test_the_rope_freqs_tensor_becomes_frequency_factors(tmp_path: Path) -> None:
    factors = [1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    scaling = load_config(write_gguf(tmp_path / "m.gguf", rope_freqs=factors)).rope_scaling
    assert scaling is not None
    assert scaling.rope_type is RopeType.FREQUENCY_FACTORS
    assert scaling.frequency_factors == tuple(factors)


@pytest.mark.parametrize("name", ["linear", "yarn"])
def test_gguf_rope_scaling_is_read(tmp_path: Path, name: str) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        rope__scaling__type=name,
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=1024,
    )
    scaling = load_config(path).rope_scaling
    assert scaling is not None
    assert (scaling.rope_type.value, scaling.factor, scaling.original_max_position_embeddings) == (name, 4.0, 1024)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"expert_count": 8}, "llama.expert_count = 8"),
        ({"attention__sliding_window": 512}, "sliding_window"),
        ({"rope__dimension_count": 8}, "rope over 8 of 16"),
        ({"attention__value_length": 32}, "value heads of 32"),
        ({"rope__scaling__type": "odd", "rope__scaling__factor": 2.0}, "'odd'"),
        ({"attention__key_length": [16, 8]}, "differs per layer"),
    ],
)
def test_an_unsupported_gguf_feature_is_refused_by_name(tmp_path: Path, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load_config(write_gguf(tmp_path / "m.gguf", **extra))


def test_an_unknown_gguf_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*known: llama, qwen2, qwen3"):
        load_config(write_gguf(tmp_path / "m.gguf", "mamba"))


@pytest.mark.parametrize("keep", [0, 3, 23, 40, 200, 500])
def test_a_gguf_file_that_was_cut_off_is_malformed_and_not_a_crash(tmp_path: Path, keep: int) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    with pytest.raises(MalformedModel):
        load_config(tmp_path / "cut.gguf")


def test_a_gguf_file_cut_in_its_last_tensor_is_found_before_it_is_used(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MalformedModel, match="cut off"):
        load_config(tmp_path / "cut.gguf")


def test_damaged_gguf_headers_never_raise_anything_but_our_errors(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    random = np.random.default_rng(3)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in random.integers(0, 900, 3):
            damaged[position] = random.integers(0, 256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with contextlib.suppress(ModelFilesError):
            load_config(tmp_path / "damaged.gguf")


def test_a_big_endian_or_future_gguf_is_refused(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    for version, words in ((b"\x00\x00\x00\x03", "big-endian"), (b"\x09\x00\x00\x00", "version 9")):
        whole[4:8] = version
        (tmp_path / "odd.gguf").write_bytes(whole)
        with pytest.raises(UnsupportedModel, match=words):
            load_config(tmp_path / "odd.gguf")

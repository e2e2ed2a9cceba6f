"""Weights: what is opened equals what transformers and the gguf package wrote, and what does not fit is named."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from modelfiles.digest import model_digest
from modelfiles.errors import MalformedModel, ModelNotFound, UnsupportedModel, WeightsMismatch
from modelfiles.gguf_file import BLOCK_SIZES, TensorType
from modelfiles.quantization import CHUNK_ELEMENTS, dequantize, dequantize_all
from modelfiles.tensor_names import expected_tensors
from modelfiles.weights import open_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_model(family: str, tied: bool = False) -> Any:
    """A random model of transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    extra = {"head_dim": 16} if family == "qwen3" else {}
    config = AutoConfig.for_model(family, tie_word_embeddings=tied, **SHAPE, **extra)
    return AutoModelForCausalLM.from_config(config)


def state_of(model: Any, tied: bool) -> dict[str, npt.NDArray[np.float32]]:
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    return state


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def permute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """As llama.cpp's converter does it (LlamaModel.permute)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, family: str, state: dict[str, npt.NDArray[np.float32]], kind: gguf.GGMLQuantizationType
) -> dict[str, npt.NDArray[np.float32]]:
    """Write a checkpoint; returns what its tensors are after quantisation, under Hugging Face's names."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    expected = dict[str, npt.NDArray[np.float32]]()
    for name, values in state.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]) if family == "llama" else None
        stored = permute(values, heads) if heads and values.ndim == 2 else values
        actual = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(stored), actual)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=actual)
        values_again = gguf.quants.dequantize(packed, actual).reshape(stored.shape)
        expected[name] = unpermute(values_again, heads) if heads and values.ndim == 2 else values_again
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def assert_equal(weights: Any, expected: dict[str, npt.NDArray[np.float32]]) -> None:
    assert set(weights) == set(expected)
    for name, values in expected.items():
        assert np.array_equal(weights[name].float32(), values), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_of_transformers_opens_as_it_was_saved(tmp_path: Path, family: str, tied: bool) -> None:
    model = make_model(family, tied)
    model.save_pretrained(tmp_path)
    assert_equal(open_weights(tmp_path), state_of(model, tied))


def test_bfloat16_is_mapped_as_bits_and_converts_exactly(tmp_path: Path) -> None:
    import torch

    model = make_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    tensor = weights["model.norm.weight"]
    assert (tensor.dtype, tensor.array.dtype) == ("bfloat16", np.dtype("uint16"))
    assert_equal(weights, state_of(model, tied=False))
    ours = torch.from_numpy(weights["lm_head.weight"].array).view(torch.bfloat16)
    assert torch.equal(ours, model.state_dict()["lm_head.weight"])


def test_a_sharded_checkpoint_opens_as_one(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal(open_weights(tmp_path), state_of(model, tied=False))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(MalformedModel, match=lost.name):
        open_weights(tmp_path)


def test_an_index_cannot_name_files_outside_the_folder(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MalformedModel, match="outside the folder"):
        open_weights(tmp_path)


def test_torch_takes_the_arrays_without_a_warning_and_a_write_stays_private(tmp_path: Path) -> None:
    import torch

    make_model("llama").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    torch.from_numpy(open_weights(tmp_path)["lm_head.weight"].array).zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert open_weights(tmp_path)["lm_head.weight"].array.any()


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\.input_layernorm\.weight.* and 4 more"),
        ({"num_hidden_layers": 1}, r"unexpected model\.layers\.1\."),
        ({"vocab_size": 321}, r"embed_tokens\.weight \(320, 64\) instead of \(321, 64\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    make_model("llama").save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(WeightsMismatch, match=words):
        open_weights(tmp_path)


def test_a_tied_checkpoint_may_carry_a_copy_of_the_embedding(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_weights(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelNotFound):
        open_weights(tmp_path)


def test_an_element_type_that_we_cannot_read_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    make_model("llama").save_pretrained(tmp_path)
    save_file({"model.norm.weight": np.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight has type F64"):
        open_weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000], ids=lambda keep: f"{keep}-bytes")
def test_a_safetensors_file_that_was_cut_off_is_malformed(tmp_path: Path, keep: int) -> None:
    make_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(MalformedModel):
        open_weights(tmp_path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_opens_as_the_reference_dequantises_it(tmp_path: Path, family: str, kind: str) -> None:
    state = state_of(make_model(family), tied=False)
    expected = write_gguf(tmp_path / "m.gguf", family, state, gguf.GGMLQuantizationType[kind])
    assert_equal(open_weights(tmp_path / "m.gguf"), expected)
    if kind == "F32":
        assert_equal(open_weights(tmp_path / "m.gguf"), state)


@pytest.mark.parametrize("kind", list(TensorType), ids=lambda kind: kind.name)
def test_random_blocks_dequantise_bit_for_bit_as_in_the_gguf_package(kind: TensorType) -> None:
    """Every bit pattern of scales and codes, which a quantiser would not write; not-a-number compares as bits."""
    elements, num_bytes = BLOCK_SIZES[kind]
    num_blocks = 3 * CHUNK_ELEMENTS // elements + 7
    raw = np.random.default_rng(11).integers(0, 256, num_blocks * num_bytes, dtype=np.uint8)
    out = np.full(num_blocks * elements, np.nan, np.float32)
    with np.errstate(all="ignore"):
        dequantize(kind, raw, out)
        expected = gguf.quants.dequantize(raw.reshape(num_blocks, num_bytes), gguf.GGMLQuantizationType(kind)).reshape(
            -1
        )
        whole = dequantize_all(kind, raw)
    same = (out.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(out) & np.isnan(expected))
    assert same.all()
    assert np.array_equal(whole, out, equal_nan=True)


def test_an_unsupported_quantisation_names_tensor_and_type(tmp_path: Path) -> None:
    state = state_of(make_model("llama"), tied=False)
    write_gguf(tmp_path / "m.gguf", "llama", state, gguf.GGMLQuantizationType.Q5_0)
    with pytest.raises(UnsupportedModel, match=r"token_embd\.weight has GGUF type Q5_0.*supported: F32"):
        open_weights(tmp_path / "m.gguf")


def test_a_bias_that_the_decoder_would_ignore_is_refused(tmp_path: Path) -> None:
    state = state_of(make_model("llama"), tied=False)
    state["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    write_gguf(tmp_path / "m.gguf", "llama", state, gguf.GGMLQuantizationType.F32)
    with pytest.raises(WeightsMismatch, match=r"unexpected model\.layers\.0\.self_attn\.q_proj\.bias"):
        open_weights(tmp_path / "m.gguf")


def quantized(folder: Path) -> tuple[Path, dict[str, npt.NDArray[np.float32]]]:
    """A Q8_0 file and its expected values."""
    state = state_of(make_model("llama"), tied=False)
    expected = write_gguf(folder / "m.gguf", "llama", state, gguf.GGMLQuantizationType.Q8_0)
    return folder / "m.gguf", expected


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_rows_can_be_read_alone(tmp_path: Path, kind: str) -> None:
    """Of a tensor whose rows the file has in another order, and of a vector."""
    state = state_of(make_model("llama"), tied=False)
    expected = write_gguf(tmp_path / "m.gguf", "llama", state, gguf.GGMLQuantizationType[kind])
    weights = open_weights(tmp_path / "m.gguf")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        assert np.array_equal(weights[name].float32(3, 11), expected[name][3:11])
        assert weights[name].shape == expected[name].shape


def test_the_digest_is_that_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    path, _ = quantized(tmp_path)
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes(path.read_bytes())
    os.chmod(copy, stat.S_IRUSR)
    assert model_digest(copy) == model_digest(path)
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert model_digest(copy) != model_digest(path)


def test_the_digest_of_a_folder_sees_config_tokenizer_and_weights(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    digests = {model_digest(tmp_path)}
    change_config(tmp_path, rope_theta=1.0)
    digests.add(model_digest(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    digests.add(model_digest(tmp_path))
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    digests.add(model_digest(tmp_path))
    file.write_bytes(content.replace(b"layers.1.input_layernorm", b"layers.0.input_layernorm", 1))
    digests.add(model_digest(tmp_path))
    assert len(digests) == 5


def test_expected_tensors_are_those_of_transformers(tmp_path: Path) -> None:
    from modelfiles import load_config

    for family in ("llama", "qwen2", "qwen3"):
        model = make_model(family)
        model.config.save_pretrained(tmp_path / family)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert expected_tensors(load_config(tmp_path / family)) == shapes

"""The default model itself: weights, tokens and prompts equal those of the reference implementations."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from modelfiles import load_chat_template, load_config, load_special_tokens, load_tokenizer
from modelfiles.digest import model_digest
from modelfiles.gguf_file import read_gguf
from modelfiles.store import resolve
from modelfiles.tensor_names import hugging_face_name, permuted_heads
from modelfiles.weights import open_weights

pytestmark = pytest.mark.model

TEXTS: list[str] = json.loads((Path(__file__).parent / "data" / "multilingual_texts.json").read_text())
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Où est la gare ?\n"}],
    [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi 👋"},
        {"role": "user", "content": "<|im_end|> 1 + 1 = ?"},
    ],
]


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve("smollm2", offline=True)


@pytest.fixture(scope="module")
def as_it_is(model: Path) -> Any:
    """What transformers builds from the file: no pre-tokenizer "smollm" is known to 5.23, so it takes GPT-2's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)


@pytest.fixture(scope="module")
def theirs(as_it_is: Any) -> Any:
    """transformers' tokenizer with the pre-tokenizer of SmolLM2's published tokenizer.json (and of llama.cpp)."""
    from tokenizers import pre_tokenizers

    tokenizer = copy.deepcopy(as_it_is)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_the_config_is_that_of_smollm2_135m(model: Path) -> None:
    config = load_config(model)
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("llama", 49152, 576)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 100000.0, None)
    assert (config.tie_word_embeddings, config.max_position_embeddings) == (True, 8192)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_tokens_equal_transformers_on_every_script(model: Path, theirs: Any) -> None:
    ours = load_tokenizer(model)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_tokens_equal_those_of_transformers_as_it_is_where_no_digits_are(model: Path, as_it_is: Any) -> None:
    ours = load_tokenizer(model)
    texts = [text for text in TEXTS if not any(character.isnumeric() for character in text)]
    assert len(texts) > 25
    for text in texts:
        assert ours.encode(text).ids == as_it_is(text)["input_ids"], text


def test_every_text_survives_encoding_and_decoding(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("chat", CHATS, ids=["one-turn", "system", "three-turns"])
def test_a_rendered_chat_has_the_tokens_that_transformers_gives(model: Path, theirs: Any, chat: Any) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = load_chat_template(model)
    assert source is not None
    special = load_special_tokens(model)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    prompt = environment.from_string(source).render(
        messages=chat, add_generation_prompt=True, bos_token=special.bos, eos_token=special.eos
    )
    assert prompt == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(model).encode(prompt, add_special_tokens=False).ids == expected


def test_weights_equal_the_gguf_packages_dequantisation(model: Path) -> None:
    """Every seventh tensor covers all kinds and types."""
    file, config = read_gguf(model), load_config(model)
    weights = open_weights(model)
    assert len(weights) == 272
    for tensor in list(file.tensors.values())[::7]:
        name = hugging_face_name(tensor.name)
        assert name is not None
        raw = np.frombuffer(file.tensor_bytes(tensor.name), np.uint8)
        kind = gguf.GGMLQuantizationType(tensor.type_number)
        stored = raw.view(np.float32) if kind == gguf.GGMLQuantizationType.F32 else raw.reshape(tensor.shape[0], -1)
        expected = gguf.quants.dequantize(stored, kind).reshape(tensor.shape)
        heads = permuted_heads(config, name)
        if heads is not None:
            expected = expected.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        assert np.array_equal(weights[name].array, expected), name


def test_our_header_parser_agrees_with_the_gguf_package(model: Path) -> None:
    theirs = gguf.GGUFReader(model)
    ours = read_gguf(model)
    assert {
        tensor.name: (tensor.data_offset, int(tensor.tensor_type), tuple(tensor.shape[::-1]))
        for tensor in theirs.tensors
    } == {tensor.name: (tensor.offset, tensor.type_number, tensor.shape) for tensor in ours.tensors.values()}
    for name, field in theirs.fields.items():
        if name.startswith("GGUF."):
            continue
        if field.types[0] is not gguf.GGUFValueType.ARRAY:
            assert ours.metadata[name] == field.contents()
        elif field.types[-1] is gguf.GGUFValueType.STRING:
            assert ours.read_strings(name) == field.contents()
        else:
            assert ours.read_numbers(name) == field.contents()


def test_the_digest_is_stable(model: Path) -> None:
    """Another value means that running services of different versions would refuse each other's KV blocks."""
    assert model_digest(model) == "0526f00b2aa9df11c25276e90e6cd793fce40cdbbe994e4dc7d1c9c69bcd039a"

"""Tokenizers built from GGUF metadata equal those that the metadata was written from, on many scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from modelfiles import load_chat_template, load_chat_templates, load_special_tokens, load_tokenizer
from modelfiles.errors import MalformedModel, UnsupportedModel

TEXTS: list[str] = json.loads((Path(__file__).parent / "data" / "multilingual_texts.json").read_text())
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>"]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Published:
    """A tokenizer as its authors published it: what a GGUF file is converted from."""

    tokenizer: Tokenizer
    pre: str


def trained(pre_tokenizer: Any, ignore_merges: bool = False, normalizer: Any = None) -> Tokenizer:
    """Byte-level BPE with merges learned from the corpus itself, so that most of them are used."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in USER_DEFINED])
    return tokenizer


def byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level(use_regex=False)]
    )


def gpt2() -> Tokenizer:
    return trained(byte_level(use_regex=True))


def smollm() -> Tokenizer:
    """The pre_tokenizer of SmolLM2's tokenizer.json."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return trained(pre_tokenizers.Sequence([digits, byte_level(use_regex=True)]))


def llama3() -> Tokenizer:
    """As Llama 3's tokenizer.json: merges ignored for whole pieces, a BOS before every text."""
    tokenizer = trained(split_then_bytes(LLAMA3_SPLIT), ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|>:1 $B:1", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def qwen2() -> Tokenizer:
    """Split and normaliser are taken from transformers' own Qwen2Tokenizer."""
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    return trained(backend.pre_tokenizer, normalizer=normalizers.NFC())


FAMILIES: dict[str, Callable[[], Tokenizer]] = {"gpt-2": gpt2, "smollm": smollm, "llama-bpe": llama3, "qwen2": qwen2}


def write_gguf(path: Path, tokenizer: Tokenizer, pre: str | None, **extra: Any) -> Path:
    """As llama.cpp's converter writes a byte-level vocabulary."""
    state = json.loads(tokenizer.to_str())
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(index) for index in range(size)]
    kinds = [
        gguf.TokenType.NORMAL
        if index not in added
        else gguf.TokenType.CONTROL
        if added[index]["special"]
        else gguf.TokenType.USER_DEFINED
        for index in range(size)
    ]
    writer = start(path, "gpt2", tokens, kinds)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for name, value in extra.items():
        getattr(writer, name)(value)
    return finish(writer, path)


def start(path: Path, kind: str, tokens: list[str], kinds: list[Any]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    return writer


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", FAMILIES)
def test_a_byte_level_tokenizer_survives_gguf_on_every_script(tmp_path: Path, pre: str) -> None:
    published = FAMILIES[pre]()
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", published, pre))
    for text in [*TEXTS, "<think>x</think>", "  ".join(TEXTS)]:
        for special in (False, True):
            assert ours.encode(text, add_special_tokens=special).ids == (
                published.encode(text, add_special_tokens=special).ids
            ), text
        ids = ours.encode(text, add_special_tokens=False).ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == published.decode(ids, skip_special_tokens=skip)


def test_llama3_takes_a_whole_piece_that_no_merge_makes(tmp_path: Path) -> None:
    """`ignore_merges`: 100,000 pieces of Llama 3 are reached by merges, a few are not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for pre, pieces in (("llama-bpe", 1), ("gpt-2", 2)):
        writer = start(tmp_path / "m.gguf", "gpt2", [*alphabet, "xy", "xyz"], [1] * 258)
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(["x y"])
        tokenizer = load_tokenizer(finish(writer, tmp_path / "m.gguf"))
        assert len(tokenizer.encode("xyz").ids) == pieces


def test_the_families_really_differ_on_the_corpus(tmp_path: Path) -> None:
    """If they did not, the test above could not fail for a wrong entry of the table."""
    merged = smollm()
    encodings = set[tuple[int, ...]]()
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", merged, pre))
        encodings.add(tuple(index for text in TEXTS for index in ours.encode(text).ids))
    assert len(encodings) == 4


def test_transformers_builds_the_same_from_a_gguf_file_of_gpt2_kind(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf", gpt2(), "gpt-2")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = load_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_bos_and_eos_are_added_as_the_metadata_says(tmp_path: Path) -> None:
    for bos in (False, True):
        for eos in (False, True):
            path = write_gguf(tmp_path / "m.gguf", llama3(), "llama-bpe", add_add_bos_token=bos, add_add_eos_token=eos)
            ids = load_tokenizer(path).encode("hello").ids
            assert (ids[0] == 0, ids[-1] == 2) == (bos, eos)


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[Any]]:
    """Llama 2's shape: <unk> <s> </s>, 256 bytes, then pieces with scores by rank."""
    words = [
        "▁",
        "▁h",
        "e",
        "l",
        "ll",
        "llo",
        "▁hello",
        "o",
        "w",
        "r",
        "d",
        "▁w",
        "or",
        "ld",
        "▁world",
        "h",
        "é",
        "▁▁",
        "中",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(words)
    return tokens, scores, kinds


def write_sentencepiece(path: Path) -> Path:
    tokens, scores, kinds = sentencepiece_vocabulary()
    writer = start(path, "llama", tokens, kinds)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return finish(writer, path)


def test_a_sentencepiece_vocabulary_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(write_sentencepiece(tmp_path / "m.gguf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*TEXTS, "hello world", " hello", "hello</s>hello <s> x", "▁x"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize(
    ("kind", "pre", "words"),
    [("bert", None, "tokenizer 'bert'"), ("gpt2", "chatglm-bpe", "pre-tokenizer 'chatglm-bpe'")],
)
def test_a_vocabulary_that_we_cannot_rebuild_is_refused_by_name(
    tmp_path: Path, kind: str, pre: str | None, words: str
) -> None:
    writer = start(tmp_path / "m.gguf", kind, ["a", "b"], [1, 1])
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_merges([])
    with pytest.raises(UnsupportedModel, match=words):
        load_tokenizer(finish(writer, tmp_path / "m.gguf"))


def test_merges_of_unknown_pieces_are_malformed(tmp_path: Path) -> None:
    writer = start(tmp_path / "m.gguf", "gpt2", ["a", "b"], [1, 1])
    writer.add_token_merges(["a c"])
    with pytest.raises(MalformedModel, match="do not fit together"):
        load_tokenizer(finish(writer, tmp_path / "m.gguf"))


def test_a_gguf_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(MalformedModel, match=r"tokenizer\.ggml\.model"):
        load_tokenizer(finish(gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), tmp_path / "m.gguf"))


def test_templates_and_special_tokens_come_from_gguf_metadata(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    path = write_gguf(tmp_path / "m.gguf", gpt2(), "gpt-2", add_chat_template=templates)
    assert load_chat_template(path) == "A"
    assert load_chat_templates(path) == {"default": "A", "tool_use": "B"}
    special = load_special_tokens(path)
    assert (special.bos, special.eos, special.unk) == ("<|endoftext|>", "<|im_end|>", None)


def folder_with(folder: Path, **files: object) -> Path:
    (folder / "config.json").write_text("{}")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_a_folder_gives_its_tokenizer_without_padding_and_truncation(tmp_path: Path) -> None:
    tokenizer = gpt2()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder_with(tmp_path) / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    assert all(ours.encode(text).ids == tokenizer.encode(text).ids for text in TEXTS)


def test_a_folder_without_or_with_a_broken_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    folder_with(tmp_path)
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MalformedModel, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_special_tokens_may_be_strings_or_objects(tmp_path: Path) -> None:
    folder_with(
        tmp_path,
        special_tokens_map={"pad_token": "<pad>", "bos_token": "<old>"},
        tokenizer_config={"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None},
    )
    special = load_special_tokens(tmp_path)
    assert (special.bos, special.eos, special.unk, special.pad) == ("<s>", "</s>", None, "<pad>")


def test_the_jinja_file_wins_over_the_field_as_in_transformers(tmp_path: Path) -> None:
    folder_with(tmp_path, tokenizer_config={"chat_template": "field"})
    assert load_chat_template(tmp_path) == "field"
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert load_chat_templates(tmp_path) == {"default": "file", "tool_use": "tools"}


def test_a_list_of_named_templates_is_read_and_a_model_without_any_has_none(tmp_path: Path) -> None:
    entries = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    folder_with(tmp_path, tokenizer_config={"chat_template": entries})
    assert load_chat_templates(tmp_path) == {"default": "A", "rag": "B"}
    folder_with(tmp_path, tokenizer_config={})
    assert load_chat_template(tmp_path) is None
    folder_with(tmp_path, tokenizer_config={"chat_template": 3})
    with pytest.raises(MalformedModel, match="chat_template"):
        load_chat_template(tmp_path)

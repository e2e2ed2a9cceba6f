"""A `tokenizers.Tokenizer` built from GGUF metadata.

GGUF keeps vocabulary, merges and the *name* of the pre-tokenizer. The truth is the tokenizer.json that the file was
converted from, so normaliser, splits and flags below are those of the published tokenizer.json behind each name.
transformers 5.23 builds the same except where its table misses a name: "smollm" without its digit splitting,
"llama-bpe" without `ignore_merges` and BOS (llama.cpp has both), "qwen2" without NFC.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from modelfiles.errors import MalformedModel, UnsupportedModel
from modelfiles.gguf_file import GgufFile

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"  # sentencepiece's spelling of a space


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before byte-level BPE. `split` None: GPT-2's own pattern."""

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_GPT2 = PreTokenizer()
_DIGITS_THEN_GPT2 = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(split=_QWEN2_SPLIT, nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "default": _GPT2,
        "gpt-2": _GPT2,
        "smollm": _DIGITS_THEN_GPT2,
        "starcoder": _DIGITS_THEN_GPT2,
        "refact": _DIGITS_THEN_GPT2,
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
    }
)


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that the metadata describes.

    Raises: UnsupportedModel (vocabulary kind or pre-tokenizer, by name), MalformedModel.
    """
    vocabulary = _read_vocabulary(file)
    if vocabulary.kind == "gpt2":
        tokenizer = _byte_level(file, vocabulary)
    elif vocabulary.kind == "llama":
        tokenizer = _sentencepiece(file, vocabulary)
    else:
        raise UnsupportedModel(f"{file.path}: tokenizer {vocabulary.kind!r} is not supported (known: gpt2, llama)")
    _add_marked_tokens(tokenizer, vocabulary)
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    kind: str
    tokens: Sequence[str]
    types: Sequence[int]

    def type_of(self, token_id: int) -> int:
        return self.types[token_id] if self.types else TokenType.NORMAL


def _read_vocabulary(file: GgufFile) -> _Vocabulary:
    kind, tokens = file.get_str(_PREFIX + "model"), file.read_strings(_PREFIX + "tokens")
    if kind is None or tokens is None:
        raise MalformedModel(f"{file.path} holds no tokenizer ({_PREFIX}model, {_PREFIX}tokens)")
    types = [int(entry) for entry in file.read_numbers(_PREFIX + "token_type") or []]
    if types and len(types) != len(tokens):
        raise MalformedModel(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    return _Vocabulary(kind, tokens, types)


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    name = file.get_str(_PREFIX + "pre") or "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedModel(f"{file.path}: pre-tokenizer {name!r} is not supported (known: {known})")
    style = PRE_TOKENIZERS[name]
    merges = file.read_strings(_PREFIX + "merges")
    if merges is None:
        raise MalformedModel(f"{file.path}: {_PREFIX}merges is missing")
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    pairs = _split_merges(file, merges)
    with _consistent(file):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=style.ignore_merges))
    if style.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(style, file.get_bool(_PREFIX + "add_space_prefix") or False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(file, vocabulary, add_bos=style.add_bos) or processors.ByteLevel(
        trim_offsets=False
    )
    return tokenizer


def _pre_tokenizer(style: PreTokenizer, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    parts = list[pre_tokenizers.PreTokenizer]()
    if style.digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if style.split is not None:
        parts.append(pre_tokenizers.Split(Regex(style.split), behavior="isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=style.split is None))
    return pre_tokenizers.Sequence(parts)


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    """Llama 2's kind: pieces with scores, bytes as fallback. Best score merges first, which BPE merges can express."""
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = file.read_strings(_PREFIX + "merges")
    pairs = _split_merges(file, merges) if merges else _merges_from_scores(file, vocab)
    unknown_id = file.get_int(_PREFIX + "unknown_token_id")
    unknown = _token(file, vocabulary, unknown_id) if unknown_id is not None else None
    with _consistent(file):
        tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    add_prefix_space = file.get_bool(_PREFIX + "add_space_prefix") is not False
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="first" if add_prefix_space else "never", split=False
    )
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    processor = _post_processor(file, vocabulary, add_bos=True)
    if processor is not None:
        tokenizer.post_processor = processor
    return tokenizer


def _merges_from_scores(file: GgufFile, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, in the order in which sentencepiece would merge them."""
    scores = file.read_numbers(_PREFIX + "scores")
    if scores is None or len(scores) < len(vocab):
        raise MalformedModel(f"{file.path}: {_PREFIX}scores is missing or short, and there are no merges")
    pairs = list[tuple[float, int, int, str, str]]()
    for piece, index in vocab.items():
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        found.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        pairs.extend((scores[index], len(left), len(right), left, right) for left, right in found)
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in pairs]


@contextmanager
def _consistent(file: GgufFile) -> Generator[None]:
    """tokenizers raises bare Exception, e.g. for a merge of pieces that the vocabulary lacks."""
    try:
        yield
    except Exception as error:  # tokenizers raises bare Exception
        raise MalformedModel(f"{file.path}: vocabulary and merges do not fit together ({error})") from error


def _split_merges(file: GgufFile, merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = list[tuple[str, str]]()
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not separator:
            raise MalformedModel(f"{file.path}: merge {merge!r} does not name two pieces")
        pairs.append((left, right))
    return pairs


def _post_processor(file: GgufFile, vocabulary: _Vocabulary, add_bos: bool) -> processors.PostProcessor | None:
    """BOS and EOS around a text, where the metadata (or else the vocabulary's kind) asks for them."""
    stated_bos, stated_eos = file.get_bool(_PREFIX + "add_bos_token"), file.get_bool(_PREFIX + "add_eos_token")
    bos = file.get_int(_PREFIX + "bos_token_id") if (add_bos if stated_bos is None else stated_bos) else None
    eos = file.get_int(_PREFIX + "eos_token_id") if stated_eos else None
    added = {_token(file, vocabulary, token_id): token_id for token_id in (bos, eos) if token_id is not None}
    if not added:
        return None
    before = [_token(file, vocabulary, bos)] if bos is not None else []
    after = [_token(file, vocabulary, eos)] if eos is not None else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=list(added.items()),
    )


def _token(file: GgufFile, vocabulary: _Vocabulary, token_id: int) -> str:
    if not 0 <= token_id < len(vocabulary.tokens):
        raise MalformedModel(f"{file.path}: token id {token_id} is outside the {len(vocabulary.tokens)} tokens")
    return vocabulary.tokens[token_id]


def _add_marked_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens match whole and are skipped when decoding; user-defined ones match whole and are text."""
    special_types = {TokenType.CONTROL, TokenType.UNKNOWN} if vocabulary.kind == "llama" else {TokenType.CONTROL}
    marked = [
        (token, vocabulary.type_of(index))
        for index, token in enumerate(vocabulary.tokens)
        if vocabulary.type_of(index) in special_types or vocabulary.type_of(index) == TokenType.USER_DEFINED
    ]
    special = [AddedToken(token, special=True, normalized=False) for token, kind in marked if kind in special_types]
    plain = [AddedToken(token, special=False, normalized=False) for token, kind in marked if kind not in special_types]
    tokenizer.add_special_tokens(special)  # pyright: ignore[reportUnknownMemberType]  (the stub says list[Unknown])
    tokenizer.add_tokens(plain)  # pyright: ignore[reportUnknownMemberType]  (same)

"""Incremental text equals the full decode, whatever the token boundaries are."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gateway.detokenize import Detokenizer, TextStream

CORPUS = [
    "hello world, how are you?",
    "día señor ñandú",
    "北京 東京 서울",
    "🙂🙃👩‍👩‍👧‍👦 party",
    "naïve façade — “quotes”",
]
SPECIAL = "<|end|>"


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("plain added ✓", special=False)])
    return tokenizer


@cache
def sentencepiece_like() -> Tokenizer:
    """Llama 2's decoder: ▁ for spaces, byte fallback, one leading space stripped."""
    vocabulary = {"<unk>": 0, SPECIAL: 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ["▁", "h", "e", "l", "o", "▁he", "ll", "ñ", "京", "▁w", "r", "d"]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return tokenizer


def shown(detokenizer: Detokenizer, ids: list[int], *, skip: bool = True, **stops: object) -> tuple[str, str | None]:
    stream = TextStream(detokenizer.decoder(skip), **stops)  # type: ignore[arg-type]
    text = ""
    for token_id in ids:
        delta = stream.push(token_id)
        text += delta.text
        if delta.stop is not None:
            return text, delta.stop
    delta = stream.finish()
    return text + delta.text, delta.stop


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.booleans())
def test_text_of_a_real_encoding_comes_back_whole(text: str, skip: bool) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert shown(Detokenizer(tokenizer), ids, skip=skip)[0] == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans())
def test_any_byte_level_ids_equal_the_full_decode(data: st.DataObject, skip: bool) -> None:
    """Any ids, also those that are no UTF-8, special ones and added ones."""
    tokenizer = byte_level()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30))
    assert shown(Detokenizer(tokenizer), ids, skip=skip)[0] == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20).filter(lambda text: "\ufffd" not in text))
def test_the_window_decoder_equals_the_full_decode_on_byte_fallback(text: str) -> None:
    tokenizer = sentencepiece_like()
    ids = [2 + byte for byte in text.encode()]
    detokenizer = Detokenizer(tokenizer)
    assert not detokenizer.is_byte_level
    assert shown(detokenizer, ids)[0] == tokenizer.decode(ids)


def test_the_window_decoder_keeps_spaces_between_words() -> None:
    tokenizer = sentencepiece_like()
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[piece] for piece in ["▁he", "ll", "o", "▁w", "o", "r", "ll", "d"]]
    assert shown(Detokenizer(tokenizer), ids)[0] == tokenizer.decode(ids) == "hello worlld"


def test_half_a_character_is_never_shown() -> None:
    tokenizer = byte_level()
    stream = TextStream(Detokenizer(tokenizer).decoder(True))
    alphabet = tokenizer.get_vocab()
    table = {byte: char for char, byte in __import__("gateway.detokenize", fromlist=["_ALPHABET"])._ALPHABET.items()}
    deltas = [stream.push(alphabet[table[byte]]).text for byte in "é🙂".encode()]
    assert deltas == ["", "é", "", "", "", "🙂"]
    stream.push(alphabet[table["🙂".encode()[0]]])
    assert stream.finish().text == "\ufffd"


def test_special_tokens_are_skipped_only_if_asked() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode("hi").ids, tokenizer.token_to_id(SPECIAL)]
    assert shown(Detokenizer(tokenizer), ids)[0] == "hi"
    assert shown(Detokenizer(tokenizer), ids, skip=False)[0] == "hi" + SPECIAL


@pytest.mark.parametrize(
    ("text", "stops", "include", "expected"),
    [
        ("one two three", ["two"], False, ("one ", "two")),
        ("one two three", ["two"], True, ("one two", "two")),
        ("one two three", ["four"], False, ("one two three", None)),
        ("abc", ["b", "abc"], False, ("a", "b")),
        ("xabcy", ["abc", "bc"], False, ("x", "abc")),
        ("ends with sto", ["stop"], False, ("ends with sto", None)),
        ("ñandú END", ["END"], False, ("ñandú ", "END")),
        ("a🙂b", ["🙂"], False, ("a", "🙂")),
    ],
)
def test_stop_strings_cut_the_text(
    text: str, stops: list[str], include: bool, expected: tuple[str, str | None]
) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    assert shown(Detokenizer(tokenizer), ids, stops=stops, include_stop=include) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.text("abé🙂", max_size=24),
    st.lists(st.text("abé🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_where_a_stop_string_cuts_does_not_depend_on_token_boundaries(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """Cut the text's bytes anywhere: the same text and the same stop string come out."""

    class Pieces:
        """A decoder whose tokens are arbitrary pieces of the text."""

        def __init__(self, pieces: list[str]) -> None:
            self._pieces = pieces

        def push(self, token_id: int) -> str:
            return self._pieces[token_id]

        def flush(self) -> str:
            return ""

    def run(pieces: list[str]) -> tuple[str, str | None]:
        stream = TextStream(Pieces(pieces), stops)
        out = ""
        for number in range(len(pieces)):
            delta = stream.push(number)
            out += delta.text
            if delta.stop:
                return out, delta.stop
        return out + stream.finish().text, None

    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, single = run([text]), run(list(text))
    assert run(pieces) == whole == single
    if whole[1] is None:
        assert whole[0] == text
    else:
        assert text.startswith(whole[0] + whole[1])


def test_stop_strings_count_only_after_min_tokens() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    ids = [tokenizer.token_to_id(char) for char in "abab"]
    assert shown(detokenizer, ids, stops=["b"]) == ("a", "b")
    assert shown(detokenizer, ids, stops=["b"], min_tokens=2) == ("aba", "b")


def test_token_bytes_show_the_true_bytes_of_a_part_of_a_character() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("ü").ids
    assert b"".join(map(detokenizer.token_bytes, ids)) == "ü".encode()

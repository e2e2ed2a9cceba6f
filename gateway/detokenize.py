"""Tokens to text, one token at a time: UTF-8 safe, stop strings held back across token boundaries.

Whatever way a text is cut into tokens, the concatenated deltas equal the full decode cut at the first stop string.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """Turns ids into text that is safe to show: never half a character."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        ...


class Detokenizer:
    """A tokenizer's decoding side, shared by all requests. Finds out once which way is exact for this tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.is_byte_level = _is_byte_level(tokenizer)
        self._bytes: dict[int, bytes] = {}

    def decoder(self, skip_special_tokens: bool) -> Decoder:
        if self.is_byte_level:
            return _ByteLevelDecoder(self, skip_special_tokens)
        return _WindowDecoder(self.tokenizer, skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, filled in as tokens are met (a whole vocabulary takes 100 ms at start)."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._token_bytes(token_id)
        return found

    def _token_bytes(self, token_id: int) -> bytes:
        if not self.is_byte_level:
            return self.tokenizer.decode([token_id], skip_special_tokens=False).encode()
        token = self.tokenizer.id_to_token(token_id)
        return b"" if token is None else _byte_level_bytes(token)

    def token_text(self, token_id: int) -> str:
        """One token alone, as logprobs show it."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


class _ByteLevelDecoder:
    """Exact and cheap: byte-level tokens are bytes, so text is an incremental UTF-8 decode. 0.4 us per token."""

    __slots__ = ("_decode", "_detokenizer", "_skip", "_table")

    def __init__(self, detokenizer: Detokenizer, skip_special_tokens: bool) -> None:
        self._detokenizer = detokenizer
        self._table = detokenizer._bytes  # pyright: ignore[reportPrivateUsage]  # same module, hot path
        self._skip = skip_special_tokens
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        if self._skip and self._detokenizer.is_special(token_id):
            return ""
        data = self._table.get(token_id)
        if data is None:
            data = self._detokenizer.token_bytes(token_id)
        return self._decode(data)

    def flush(self) -> str:
        return self._decode(b"", True)


class _WindowDecoder:
    """For every other tokenizer: decode a window that starts at a safe point, show what is new.

    Method: prefix and read offsets as in vLLM and text-generation-inference. The first two tokens stay in the window,
    because SentencePiece decoders treat the start of a text specially.
    """

    __slots__ = ("_ids", "_prefix", "_read", "_shown", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._shown = ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._window_text(self._prefix, None)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._window_text(self._prefix, None))

    def _advance(self, text: str) -> str:
        delta = text[len(self._shown) :]
        self._prefix = self._read
        self._read = len(self._ids)
        self._shown = self._window_text(self._prefix, self._read)
        return delta

    def _window_text(self, start: int, end: int | None) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=self._skip)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that may be shown now; `stop` is the stop string that just ended the choice."""

    text: str
    stop: str | None = None


class TextStream:
    """One choice's text: decoder plus stop strings. Survives failover: it lives beside the token log."""

    __slots__ = ("_decoder", "_held", "_include_stop", "_longest", "_num_tokens", "_searchable_after", "_stops")

    def __init__(
        self, decoder: Decoder, stops: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._include_stop = include_stop
        self._searchable_after = min_tokens
        self._num_tokens = 0
        self._held = ""

    def push(self, token_id: int) -> TextDelta:
        """Text made showable by one more token."""
        self._num_tokens += 1
        return self._release(self._decoder.push(token_id))

    def finish(self) -> TextDelta:
        """The rest, when the choice ended by itself: nothing is held back any more, but a stop string still counts."""
        delta = self._release(self._decoder.flush())
        if delta.stop is not None:
            return delta
        rest, self._held = self._held, ""
        return TextDelta(delta.text + rest)

    def _release(self, new_text: str) -> TextDelta:
        if not self._stops:
            return TextDelta(new_text)
        if not new_text:
            return TextDelta("")
        if self._num_tokens <= self._searchable_after:  # vLLM: stop strings count only after min_tokens
            return TextDelta(new_text)
        text = self._held + new_text
        found = _first_stop(text, self._stops)
        if found is not None:
            start, stop = found
            self._held = ""
            return TextDelta(text[: start + len(stop)] if self._include_stop else text[:start], stop)
        keep = _partial_stop_length(text, self._stops, self._longest)
        self._held = text[len(text) - keep :]
        return TextDelta(text[: len(text) - keep])


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that is complete first (then the longest): the same whatever the token boundaries are."""
    best: tuple[int, int, str] | None = None
    for stop in stops:
        start = text.find(stop)
        if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
            best = (start + len(stop), start, stop)
    return None if best is None else (best[1], best[2])


def _partial_stop_length(text: str, stops: Sequence[str], longest: int) -> int:
    """Length of the longest end of `text` that may become a stop string."""
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0


# ---------------------------------------------------------------- byte-level alphabets


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder: Any = json.loads(tokenizer.to_str()).get("decoder")
    if not isinstance(decoder, dict):
        return False
    kind = cast("dict[str, Any]", decoder)
    parts: list[dict[str, Any]] = kind.get("decoders", [kind])
    return all(part["type"] == "ByteLevel" for part in parts)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """As tokenizers' ByteLevel decoder: a token with a character outside the alphabet stands for its own UTF-8."""
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:
        return token.encode()

"""The per-request token log: the commit point, and the only place that says which tokens a request has.

Pure. A token exists for the client once `append` said COMMITTED. Whatever worker it came from, the log's indices are
contiguous per choice; the stream the client sees is a prefix of it (T5), and a failover replays exactly it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from gateway.errors import TokenGap


class Verdict(Enum):
    """What became of one received token. All but COMMITTED are drops, counted under their value."""

    COMMITTED = "committed"
    OLD_ATTEMPT = "old_attempt"
    DUPLICATE = "duplicate"
    FINISHED = "choice_finished"


class FinishReason(Enum):
    """OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a choice ended. `stop` is vLLM's stop_reason: the token id or string that did it, None for EOS."""

    reason: FinishReason
    stop: int | str | None = None


@dataclass(frozen=True, slots=True)
class StopRules:
    """What ends a choice by its ids alone (stop strings are text: detokenize.py finds them and calls `finish`)."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()

    def finish_of(self, token_id: int, num_tokens: int) -> Finish | None:
        """The finish that a choice of `num_tokens` tokens ending in `token_id` has, or None."""
        if num_tokens >= self.min_tokens:
            if token_id in self.stop_token_ids:
                return Finish(FinishReason.STOP, token_id)
            if token_id in self.eos_token_ids:
                return Finish(FinishReason.STOP)
        return Finish(FinishReason.LENGTH) if num_tokens >= self.max_tokens else None


@dataclass(slots=True)
class ChoiceRecord:
    """One choice's tokens."""

    token_ids: list[int] = field(default_factory=list[int])
    finish: Finish | None = None


class TokenLog:
    """Tokens of one request, per choice, across its attempts."""

    __slots__ = ("_rules", "attempt", "choices", "num_committed", "num_unfinished")

    def __init__(self, num_choices: int, rules: StopRules) -> None:
        self._rules = rules
        self.attempt = 0
        self.choices = [ChoiceRecord() for _ in range(num_choices)]
        self.num_committed = 0
        self.num_unfinished = num_choices

    @property
    def is_complete(self) -> bool:
        return self.num_unfinished == 0

    def begin_attempt(self) -> int:
        """Number a new attempt; tokens of every earlier one are dropped from now on."""
        self.attempt += 1
        return self.attempt

    def append(self, attempt: int, choice: int, index: int, token_id: int) -> Verdict:
        """Commit one token, or say why it is dropped.

        Raises: TokenGap if tokens before it never came (the attempt is broken), also for a choice that does not exist.
        """
        if attempt != self.attempt:
            return Verdict.OLD_ATTEMPT
        if choice >= len(self.choices):
            raise TokenGap(choice, 0, index)
        record = self.choices[choice]
        if record.finish is not None:
            return Verdict.FINISHED
        length = len(record.token_ids)
        if index < length:
            return Verdict.DUPLICATE
        if index > length:
            raise TokenGap(choice, length, index)
        record.token_ids.append(token_id)
        self.num_committed += 1
        finish = self._rules.finish_of(token_id, length + 1)
        if finish is not None:
            self.finish(choice, finish)
        return Verdict.COMMITTED

    def finish(self, choice: int, finish: Finish) -> None:
        """End a choice; the first reason stands."""
        record = self.choices[choice]
        if record.finish is None:
            record.finish = finish
            self.num_unfinished -= 1

    def refine_finish(self, choice: int, finish: Finish) -> None:
        """Replace the finish that `append` just found by the stop string that the same token completed."""
        assert self.choices[choice].finish is not None
        self.choices[choice].finish = finish

    def unfinished(self) -> Collection[int]:
        return [number for number, record in enumerate(self.choices) if record.finish is None]

"""What the engine is asked for, and what it says back. Plain data: no torch, no I/O."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from engine.token_counts import TokenCounts


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. Validated by the gateway; the engine only asserts.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off (min-p keeps tokens of at least that share of
    the greatest probability, at the temperature); `num_logprobs` -1 asks for none, 0 for the drawn token's, k for the k
    most likely as well. Logprobs are those of the raw distribution, before penalties and temperature.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int = -1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class FinishReason(Enum):
    """Why a sequence ended by itself. Values equal the protocol's."""

    STOP = 1
    LENGTH = 2


def empty_table() -> array[int]:
    """A block table without blocks."""
    return array("i")


@dataclass(slots=True)
class Sequence:
    """One choice of a request: its tokens and where their KV lies.

    Only the engine's scheduler assigns to its fields. `token_ids` is prompt and output together; the KV of the first
    `num_computed_tokens` lies in the slots that `block_table` names. Position p is in slot `p % block_size` of block
    `block_table[p // block_size]`, an array of int32, so that packing a step copies memory instead of looking at every
    block of every sequence. `counts` are kept by who draws with penalties.
    """

    sequence_id: int
    request_key: int
    choice: int
    sampling: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    block_table: array[int] = field(default_factory=empty_table)
    num_computed_tokens: int = 0
    counts: TokenCounts = field(default_factory=TokenCounts, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token drawn for one sequence; `top_logprobs` are (token id, logprob), most likely first."""

    sequence_id: int
    token_id: int
    logprob: float = 0.0
    top_logprobs: tuple[tuple[int, float], ...] = ()

"""What a service says to the engine and hears back: plain data, no torch, no I/O.

Events are plain slotted dataclasses instead of frozen ones: one is made per token, and frozen costs three times as
much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from engine.prefix_cache import Link
from engine.request import FinishReason, SampledToken, SamplingParams

# ------------------------------------------------------------------ asked


@dataclass(frozen=True, slots=True)
class ChoiceStart:
    """One unfinished choice and the tokens its log already holds (failover: the engine continues after them)."""

    choice: int
    committed_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as the engine sees it. `key` is unique among live requests; `deadline` is on the engine's clock.

    For `start_prefill`, `choices` are those that want a first token; none means that only the prompt's KV is wanted.
    `links` are the prompt's hashes if `Engine.hashed` took them beforehand; the engine takes those that are missing.
    """

    key: int
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    choices: tuple[ChoiceStart, ...] = (ChoiceStart(0),)
    cache_salt: bytes = b""
    deadline: float = float("inf")
    links: tuple[Link, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """How much of a prompt lies in this engine's prefix cache: whole blocks, short of the last prompt token."""

    num_cached_blocks: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class BlockSlot:
    """Block `index` of a prompt lies in `block_id`, which may be trusted only while its generation is this one.

    `num_tokens` is the block size, less in a tail block.
    """

    index: int
    block_id: int
    generation: int
    num_tokens: int


# ------------------------------------------------------------------ heard


class EndReason(Enum):
    """Why a request ended. Values equal the protocol's."""

    FINISHED = 1
    CANCELLED = 2
    DEADLINE = 3
    INVALID = 4
    INTERNAL = 7


@dataclass(slots=True)
class RequestStats:
    """What a request cost. Times are durations in seconds of the engine's clock.

    `queue_s`: until its first chunk was scheduled (or its remote prefill promised); `prefill_s`: from there to its
    first token. `num_stop`, `num_length` and `num_abort` say how its choices ended, in vLLM's terms. What did not end
    by itself was aborted; a prompt computed for another worker is one choice and ended by length, as at vLLM's prefill
    instances.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_stop: int = 0
    num_length: int = 0
    num_abort: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class TokenEvent:
    """A token of a choice; `index` counts its output from 0 and continues after committed tokens."""

    key: int
    choice: int
    index: int
    token: SampledToken
    finish: FinishReason | None


@dataclass(slots=True)
class RequestEnded:
    """The last event of a key, and the only one of its kind.

    A transfer that still holds blocks of it (cancelled or expired meanwhile) must yet be let go with
    `release_transfer`.
    """

    key: int
    reason: EndReason
    message: str
    stats: RequestStats


@dataclass(slots=True)
class RemotePromised:
    """Admission will have room for the request: ask a prefill worker now, naming `match.num_cached_blocks` as held.

    From here until commit or abort these blocks are locked.
    """

    key: int
    match: PrefixMatch


@dataclass(slots=True)
class RemoteReserved:
    """The late answer to `try_reserve_remote`: the blocks to pull into, [num_cached_blocks, all) of the prompt."""

    key: int
    blocks: tuple[BlockSlot, ...]


@dataclass(slots=True)
class PrefillStarting:
    """A prompt's whole need is reserved. `num_blocks` will be published, from `num_blocks_held` on, with the tail."""

    key: int
    num_blocks: int
    num_cached_tokens: int


@dataclass(slots=True)
class BlocksFilled:
    """Complete blocks to publish, ascending, each once."""

    key: int
    blocks: tuple[BlockSlot, ...]


@dataclass(slots=True)
class PrefillDone:
    """The prompt is computed and every full block was announced. `tail` is the last, partial block; its unused slots
    are zero.

    The blocks stay pinned until `release_transfer`, which also brings RequestEnded.
    """

    key: int
    tail: BlockSlot | None
    first_tokens: dict[int, SampledToken]
    queue_s: float
    prefill_s: float


Event = TokenEvent | RequestEnded | RemotePromised | RemoteReserved | PrefillStarting | BlocksFilled | PrefillDone


@dataclass(slots=True)
class StepResult:
    """All that happened since the step before, in order, and what the step computed."""

    events: list[Event]
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    is_swapping: bool = False

    @property
    def is_idle(self) -> bool:
        """Nothing ran and nothing is to be told."""
        return not (self.events or self.num_decode_tokens or self.num_prefill_tokens or self.is_swapping)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What a worker tells about itself with each heartbeat (baton.proto, WorkerLoad)."""

    step_counter: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks_free: int
    num_blocks_total: int
    draining: bool
    prefill_tokens_per_s: float
    predicted_step_s: float
    num_promised: int
    num_filling: int
    num_held_tokens: int
    num_blocks_in: Mapping[str, int]  # by state of the block pool; they add up to num_blocks_total
    num_swapped: int  # sequences of those waiting whose KV is kept in host memory
    num_host_blocks_free: int
    num_host_blocks_total: int


@dataclass(slots=True)
class EngineCounters:
    """Totals since the start, for metrics; they only grow."""

    steps: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    swap_outs: int = 0  # preemptions that kept what was computed
    swap_ins: int = 0
    swapped_out_blocks: int = 0  # copied to host memory
    swapped_in_blocks: int = 0  # copied back
    recomputed_tokens: int = 0
    copied_blocks: int = 0
    evicted_blocks: int = 0
    stalled_steps: int = 0

"""One live request: its sequences and the phase it is in. Phases change only through `Group.move`.

    MATCHED ──start_local──> QUEUED ──admitted──> RUNNING
       │ ^
       │ └────────────abort──────────────┐
       └─promise──> PROMISE_QUEUED ──> PROMISED ──> RESERVING ──> FILLING ──commit──> RUNNING
    PREFILL_QUEUED ──> PREFILLING ──> HANDING_OVER

Every phase is left without a peer's help by cancel or the request's deadline (T7).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engine.errors import PhaseConflict
from engine.messages import EngineRequest, RequestStats
from engine.prefix_cache import Link
from engine.request import Sequence
from engine.swap import SwappedOut


class Phase(Enum):
    """Where a request is in its life; the value reads in error messages."""

    MATCHED = "matched"
    QUEUED = "queued"
    PROMISE_QUEUED = "queued for a promise"
    PROMISED = "promised"
    RESERVING = "waiting for blocks to fill"
    FILLING = "filling"
    RUNNING = "running"
    PREFILL_QUEUED = "queued for prefill"
    PREFILLING = "prefilling"
    HANDING_OVER = "handing over"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.MATCHED: frozenset({Phase.QUEUED, Phase.PROMISE_QUEUED}),
    Phase.QUEUED: frozenset({Phase.RUNNING}),
    Phase.PROMISE_QUEUED: frozenset({Phase.PROMISED, Phase.MATCHED}),
    Phase.PROMISED: frozenset({Phase.RESERVING, Phase.FILLING, Phase.MATCHED}),
    Phase.RESERVING: frozenset({Phase.FILLING, Phase.MATCHED}),
    Phase.FILLING: frozenset({Phase.RUNNING, Phase.MATCHED}),
    Phase.RUNNING: frozenset(),
    Phase.PREFILL_QUEUED: frozenset({Phase.PREFILLING}),
    Phase.PREFILLING: frozenset({Phase.HANDING_OVER}),
    Phase.HANDING_OVER: frozenset(),
}

PREFILL_PHASES = (Phase.PREFILL_QUEUED, Phase.PREFILLING, Phase.HANDING_OVER)


@dataclass(slots=True, eq=False)
class ScheduledSequence(Sequence):
    """A sequence with what scheduling it needs. Compared by identity."""

    group: Group = field(kw_only=True)
    max_output_tokens: int = field(kw_only=True)
    stop_token_ids: frozenset[int] = field(kw_only=True)
    length_quantile: float = field(kw_only=True)  # this sequence's own draw from the length distribution
    num_committed_tokens: int = field(kw_only=True, default=0)  # of the output, those that came with the request
    forks: list[ScheduledSequence] = field(default_factory=list["ScheduledSequence"])  # wait for this one's prompt
    links: list[Link] = field(default_factory=list[Link])
    num_filled_blocks: int = 0  # leading blocks whose content is complete and known to pool and cache
    num_slots: int = 0  # slots of the block table
    is_tail_shared: bool = False  # copy the block of the next position before writing it
    max_computed_tokens: int = 0  # high-water mark: computing below it again is recomputation
    swapped: SwappedOut | None = None  # in place of a block table, while its KV waits in host memory

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return self.sequence_id

    @property
    def target(self) -> int:
        """Compute up to here before anything is drawn: the prompt if others fork from it, else all known tokens."""
        return self.num_prompt_tokens if self.forks else len(self.token_ids)

    @property
    def num_tokens_to_target(self) -> int:
        """Tokens to compute before it draws."""
        return self.target - (self.num_computed_tokens if self.swapped is None else self.swapped.num_tokens)

    @property
    def is_decoding(self) -> bool:
        return not self.forks and len(self.token_ids) - self.num_computed_tokens == 1


@dataclass(slots=True, eq=False)
class Group:
    """One live request. `leader` computes the prompt; its forks share it and then run on their own."""

    request: EngineRequest
    arrival: int  # order of arrival: the queue's order, also after a preemption
    phase: Phase
    arrived_at: float
    stats: RequestStats
    sequences: dict[int, ScheduledSequence] = field(default_factory=dict[int, ScheduledSequence])
    num_held_blocks: int = 0  # leading blocks the other side has (prefill) or this side had when promised (decode)
    fixed_blocks: int = 0  # what admission counts while a transfer is promised or filling
    num_announced_blocks: int = 0  # prefill: leading blocks that were held or published
    credit: int = 0
    due: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None

    @property
    def key(self) -> int:
        return self.request.key

    @property
    def leader(self) -> ScheduledSequence:
        return next(iter(self.sequences.values()))

    def expect(self, call: str, *phases: Phase) -> None:
        """Raise PhaseConflict unless the request is in one of `phases`."""
        if self.phase not in phases:
            raise PhaseConflict(self.key, call, self.phase.value)

    def move(self, phase: Phase) -> None:
        """Enter `phase`."""
        assert phase in TRANSITIONS[self.phase], f"request {self.key}: {self.phase} -> {phase}"
        self.phase = phase

"""Where a prompt is prefilled: here, or by a prefill worker. A pure function of what D knows at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

HANDOVER_OVERHEAD_S = 0.005
"""What a hand-over costs beyond prefill and bytes: two round trips, a ticket, digests and the commit. The goal that the
hand-over itself is held to, and about what it takes through shared memory (docs/log.md, "Hand-over")."""

DEFAULT_TRANSFER_BYTES_PER_S = 1e9
"""Until a first hand-over is measured: what the gRPC path moves on loopback (docs/log.md)."""

LAST_STEP_TOKENS = 192
"""A prefill worker publishes at the end of a step: its default size is what moves after the last one."""


class Policy(Enum):
    """Values equal the protocol's `Disaggregation`."""

    AUTO = 0
    ALWAYS = 1
    NEVER = 2


class PrefillPath(Enum):
    LOCAL = "local"
    REMOTE = "remote"


class Reason(Enum):
    """Why a path was taken; a label of `baton_placements_total`."""

    POLICY_ALWAYS = "policy_always"
    POLICY_NEVER = "policy_never"
    NO_CANDIDATE = "no_candidate"
    ONE_BLOCK = "one_block"  # what is left to prefill is less than the hand-over of a block
    SPEED_UNKNOWN = "speed_unknown"
    LOCAL_FASTER = "local_faster"
    REMOTE_FASTER = "remote_faster"
    CANDIDATES_FAILED = "candidates_failed"  # not decided here: every candidate was tried


@dataclass(frozen=True, slots=True)
class PromptFacts:
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def num_uncached_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_tokens


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """What this worker knows of itself. Speeds are measured; 0 while unknown."""

    block_size: int
    kv_bytes_per_token: int
    prefill_tokens_per_s: float
    num_waiting_tokens: int
    num_running: int
    transfer_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class CandidateFacts:
    """What the gateway last heard of a prefill worker.

    `predicted_queue_s` is the time for all tokens that wait there now, as if served in order of arrival. P serves by
    deadline, so it is an upper bound for a prompt that is more urgent than those that wait (a short one), and exact for
    one that is less urgent until more urgent ones come after it: those are not foreseen. Ageing bounds how many pass
    (engine/queues.py). Too high a bound keeps a short prompt here, where it costs least.
    """

    predicted_queue_s: float
    prefill_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision with both predicted costs in seconds (None where not predicted)."""

    path: PrefillPath
    reason: Reason
    local_s: float | None = None
    remote_s: float | None = None


def place(policy: Policy, prompt: PromptFacts, local: LocalFacts, candidates: Sequence[CandidateFacts]) -> Placement:
    """Decide where to prefill; with Auto, by the smaller predicted cost.

    Ties go to local: nothing has to move. A prefill worker of unknown speed is taken to be as fast as we are.
    """
    if policy is Policy.NEVER:
        return Placement(PrefillPath.LOCAL, Reason.POLICY_NEVER)
    if not candidates:
        return Placement(PrefillPath.LOCAL, Reason.NO_CANDIDATE)
    if policy is Policy.ALWAYS:
        return Placement(PrefillPath.REMOTE, Reason.POLICY_ALWAYS)
    if prompt.num_uncached_tokens <= local.block_size:
        return Placement(PrefillPath.LOCAL, Reason.ONE_BLOCK)
    if local.prefill_tokens_per_s <= 0:
        return Placement(PrefillPath.LOCAL, Reason.SPEED_UNKNOWN)
    local_s = predict_local_s(prompt, local)
    remote_s = predict_remote_s(prompt, local, candidates[0])
    if remote_s < local_s:
        return Placement(PrefillPath.REMOTE, Reason.REMOTE_FASTER, local_s, remote_s)
    return Placement(PrefillPath.LOCAL, Reason.LOCAL_FASTER, local_s, remote_s)


def predict_local_s(prompt: PromptFacts, local: LocalFacts) -> float:
    """Seconds until the first token, plus what running sequences lose: they stall while these tokens are computed."""
    prefill_s = prompt.num_uncached_tokens / local.prefill_tokens_per_s
    wait_s = local.num_waiting_tokens / local.prefill_tokens_per_s
    stall_s = prefill_s if local.num_running else 0.0
    return wait_s + prefill_s + stall_s


def predict_remote_s(prompt: PromptFacts, local: LocalFacts, candidate: CandidateFacts) -> float:
    """Seconds until the first token. Moving overlaps computing, so the slower counts, and the last step after it."""
    speed = candidate.prefill_tokens_per_s or local.prefill_tokens_per_s
    prefill_s = prompt.num_uncached_tokens / speed
    token_s = local.kv_bytes_per_token / (local.transfer_bytes_per_s or DEFAULT_TRANSFER_BYTES_PER_S)
    move_s = prompt.num_uncached_tokens * token_s
    last_step_s = min(prompt.num_uncached_tokens, LAST_STEP_TOKENS) * token_s
    return candidate.predicted_queue_s + max(prefill_s, move_s) + last_step_s + HANDOVER_OVERHEAD_S

"""Where a prompt is prefilled: here, or by a prefill worker. A pure function of what D knows at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# What a hand-over costs beyond prefill and bytes: two round trips, a ticket, a verification. Measured on loopback.
HANDOVER_OVERHEAD_S = 0.005


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
    """What the gateway last heard of a prefill worker."""

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
    """Seconds until the first token. Moving overlaps computing, so the slower counts, and the last block after it."""
    speed = candidate.prefill_tokens_per_s or local.prefill_tokens_per_s
    prefill_s = prompt.num_uncached_tokens / speed
    move_s, last_block_s = 0.0, 0.0
    if local.transfer_bytes_per_s > 0:
        move_s = prompt.num_uncached_tokens * local.kv_bytes_per_token / local.transfer_bytes_per_s
        last_block_s = local.block_size * local.kv_bytes_per_token / local.transfer_bytes_per_s
    return candidate.predicted_queue_s + max(prefill_s, move_s) + last_block_s + HANDOVER_OVERHEAD_S

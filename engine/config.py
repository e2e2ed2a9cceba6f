"""What one engine may use and how it schedules. Built once, validated at the start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.errors import ConfigInvalid

DEFAULT_CHUNK_SIZE = 64


class PolicyName(Enum):
    """How prompts are cut into steps (engine/policy.py)."""

    CHUNKED = "chunked"
    FCFS = "fcfs"


class LengthEstimate(Enum):
    """How admission guesses the output length of a sequence (engine/admission.py)."""

    MAXIMUM = "maximum"
    CONSTANT = "constant"
    HISTORY = "history"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and choices of one engine. Units: tokens and blocks; memory sizes are decided by who made the KV memory.

    A prompt chunk ends at an absolute multiple of `chunk_size` or at the prompt's end, whatever else runs in the step;
    one step may take several such units of a prompt. `max_num_batched_tokens` bounds a step: decodes, then prompts.
    `vocab_size` bounds the token ids that requests may hold (0: whoever sends them has checked); one id beyond it would
    end the engine, not the request.
    `reserve_ahead`: decoding sequences get a block one step before they need it, where one is left over: for runners
    that look a step ahead.
    `cache_namespace` keys the prefix cache next to the tenant's salt: model id, digest and adapter.
    `num_host_blocks` is how many blocks host memory holds for preempted sequences (0: they are always computed again);
    `host_copy_s` is what copying one of them one way takes (0: so little that swapping always pays).
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    chunk_size: int = DEFAULT_CHUNK_SIZE
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    prefix_caching: bool = True
    cache_namespace: bytes = b""
    policy: PolicyName = PolicyName.CHUNKED
    length_estimate: LengthEstimate = LengthEstimate.HISTORY
    constant_estimate: int = 256
    estimate_seed: int = 0
    max_held_tokens: int = 65536
    prefill_ageing: float = 0.5
    num_host_blocks: int = 0
    host_copy_s: float = 0.0
    reserve_ahead: bool = False

    def __post_init__(self) -> None:
        """Refuse a configuration that could not make progress."""
        for field in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "chunk_size", "constant_estimate"):
            value = getattr(self, field)
            if value < 1:
                raise ConfigInvalid(field, value, "it must be at least 1")
        if self.block_size & (self.block_size - 1):
            raise ConfigInvalid("block_size", self.block_size, "it must be a power of two")
        if self.max_num_batched_tokens < self.max_num_seqs + self.chunk_size:
            rule = (
                f"it must be at least max_num_seqs + chunk_size = {self.max_num_seqs + self.chunk_size}, "
                "or a full batch of decodes would starve every prompt"
            )
            raise ConfigInvalid("max_num_batched_tokens", self.max_num_batched_tokens, rule)
        if self.max_held_tokens < 1:
            raise ConfigInvalid("max_held_tokens", self.max_held_tokens, "it must be at least 1")
        for field in ("prefill_ageing", "num_host_blocks", "host_copy_s"):
            value = getattr(self, field)
            if value < 0:
                raise ConfigInvalid(field, value, "it must not be negative")

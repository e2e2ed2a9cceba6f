"""What prefill and decode workers have in common: one model replica built from a spec, and the fingerprints naming it.

    spec -> metadata -> weights -> KV memory -> runner -> warm-up -> engine

Knows nothing of gRPC, HTTP or settings. torch is imported inside `load_replica`: a worker answers its probes first.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.kv_memory import KVMemory

log = logging.getLogger(__name__)

DIGEST_KIND = "xxh3-128"
KV_LAYOUT = "block,kv_heads,layers,kv,slot,head_dim/1"  # raise its number when the meaning of a block's bytes changes


class LoadPhase(Enum):
    """Parts of a worker's start, in order; the names are the health port's."""

    READ_MODEL = "read_model"
    LOAD_WEIGHTS = "load_weights"
    WARMUP = "warmup"


OnProgress = Callable[[LoadPhase, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What to build. Zero or None: derive it from what this process may use."""

    model: Path
    dtype: str = "float32"
    deterministic: bool = False
    max_model_len: int = 0
    num_threads: int = 0
    kv_memory_bytes: int | None = None
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """What does not change while the worker lives, and what others compare before KV moves."""

    layout_fingerprint: str
    numerics_fingerprint: str
    deterministic: bool
    max_model_len: int
    block_size: int
    block_bytes: int
    num_blocks: int
    max_num_seqs: int

    @property
    def kv_bytes_per_token(self) -> int:
        return self.block_bytes // self.block_size


@dataclass(frozen=True, slots=True)
class Replica:
    """A model that is ready to run: give `engine` to an EngineThread; `kv` is what transports read and write."""

    identity: ReplicaIdentity
    engine: Engine
    kv: KVMemory


def layout_fingerprint(model_digest: str, kv_dtype: str, block_size: int) -> str:
    """Equal wherever KV may move: the same model and tokenizer, and blocks that mean the same bytes."""
    return _fingerprint(model_digest, kv_dtype, str(block_size), DIGEST_KIND, KV_LAYOUT)


def numerics_fingerprint(layout: str, torch_version: str, isa: str, num_threads: int, deterministic: bool) -> str:
    """Equal wherever the same request gives the same bits; compared in deterministic mode only."""
    return _fingerprint(layout, torch_version, isa, platform.machine(), str(num_threads), str(deterministic))


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

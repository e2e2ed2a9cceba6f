"""The engine: requests in, events out, one step at a time. Pure assembly; no torch, no I/O, one thread.

How a service uses it. Every call returns at once; what follows from it comes as events out of `step()`.

Local (colocated, or a decode worker that prefills itself):
    match(request) -> PrefixMatch; start_local(key); then TokenEvent*, RequestEnded

Decode worker, remote prefill:
    match(request)                      register it, see how much is cached here, decide local or remote
    promise_remote(key)                 -> RemotePromised(key, match) once admission has room: now ask a prefill worker
    try_reserve_remote(key)             when that says `starting`: the blocks to fill, or None and later RemoteReserved
    commit_remote(key, first_tokens)    KV is there and verified: TokenEvent*, RequestEnded
    abort_remote(key)                   from promised, reserving or filling; the transport has let go of the blocks.
                                        The request is matched again: promise_remote or start_local

Prefill worker:
    start_prefill(request, num_blocks_held, due)   -> PrefillStarting, BlocksFilled*, PrefillDone
    grant_credit(key, num_blocks)                  chunks run only while credit covers the blocks they complete
    release_transfer(key, ok)                      the transfer lets go -> RequestEnded

Anywhere: cancel(key) -> RequestEnded. It may come from any phase. Where a transfer still holds blocks (a decode worker's filling
request, a prefill worker's started one), they stay pinned until release_transfer(key, ok=False), so nothing is reused
under a peer's hands. Every accepted request ends with exactly one RequestEnded; release_transfer and cancel are idempotent.

`match` and `start_prefill` raise RequestInvalid or EngineDraining and then know nothing of the request. The other calls raise
RequestUnknown for a key that ended (a race every caller has: it ended in the step before) and PhaseConflict for a wrong order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from engine.batch import Runner
from engine.config import EngineConfig
from engine.messages import BlockSlot, EngineCounters, EngineLoad, EngineRequest, PrefixMatch, StepResult
from engine.request import SampledToken


class Engine:
    """Owns every request, sequence and KV block of one model replica. Not thread-safe: engine/loop.py gives it its thread."""

    def __init__(self, config: EngineConfig, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.counters = EngineCounters()
        self._runner = runner
        self._clock = clock

    # -------------------------------------------------------------- decode and colocated

    def match(self, request: EngineRequest) -> PrefixMatch:
        """Register the request and say how much of its prompt is cached here right now. Locks nothing yet."""
        raise NotImplementedError

    def start_local(self, key: int) -> None:
        """Queue a matched request: prefill in chunks here, then decode."""
        raise NotImplementedError

    def promise_remote(self, key: int) -> None:
        """Queue a matched request for remote prefill; RemotePromised follows when its final size fits beside the others'."""
        raise NotImplementedError

    def try_reserve_remote(self, key: int) -> tuple[BlockSlot, ...] | None:
        """Blocks [num_cached_blocks, all) of a promised prompt, now owned by the transfer too; None: RemoteReserved follows."""
        raise NotImplementedError

    def commit_remote(self, key: int, first_tokens: Mapping[int, SampledToken] | None = None) -> None:
        """The KV of the whole prompt is there and verified (T2), and the transfer has let go.

        `first_tokens` are by choice; a choice with an empty log and no first token draws it here. Choices with a log fork
        from the prompt and prefill their log.
        """
        raise NotImplementedError

    def abort_remote(self, key: int) -> None:
        """The remote prefill failed and the transport has let go: free its blocks; the request is matched again."""
        raise NotImplementedError

    def cancel(self, key: int, choices: tuple[int, ...] = ()) -> None:
        """End some choices, or all; RequestEnded(CANCELLED) follows when none is left. Unknown keys are ignored."""
        raise NotImplementedError

    # -------------------------------------------------------------- prefill

    def start_prefill(self, request: EngineRequest, num_blocks_held: int, due: float) -> None:
        """Queue a prompt for a decode worker that has its first `num_blocks_held` blocks; `due` orders the queue (engine clock)."""
        raise NotImplementedError

    def grant_credit(self, key: int, num_blocks: int) -> None:
        """The decode worker has room for `num_blocks` more. Ignored for a key that ended."""
        raise NotImplementedError

    def release_transfer(self, key: int, ok: bool) -> None:
        """The transfer lets go of every block of `key`. Not ok before PrefillDone also ends the prompt (CANCELLED)."""
        raise NotImplementedError

    # -------------------------------------------------------------- both

    def step(self) -> StepResult:
        """Schedule, run, and tell what happened. Cheap when there is nothing to do."""
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        """A step now could do something: work is queued or running, or events wait to be told."""
        raise NotImplementedError

    def next_deadline(self) -> float:
        """When the earliest live request expires (infinity: none); the loop must step by then even if idle."""
        raise NotImplementedError

    def load(self) -> EngineLoad:
        """A snapshot for heartbeats and metrics."""
        raise NotImplementedError

    def drain(self) -> None:
        """Take no new requests; finish what is here."""
        raise NotImplementedError

    def check(self) -> None:
        """Assert every invariant of blocks and requests (T1, T8); for tests and idle moments."""
        raise NotImplementedError

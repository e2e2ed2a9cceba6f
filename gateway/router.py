"""Which decode worker runs a request, and which prefill workers it may ask. Pure: no I/O, no clock of its own.

The choice minimises a predicted cost in seconds: time to the first token (queued and uncached prompt tokens over the
measured prefill rate) plus what the request will wait in decode because of others. Every number is a report or this
gateway's own count since; a worker that is full says so itself (END_OVERLOADED) and the failover tries the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import xxhash

from gateway.revisions import Preference, choose

MAX_CANDIDATES = 4
DEFAULT_PREFILL_TOKENS_PER_S = 2_000.0
DEFAULT_STEP_S = 0.02
EXPECTED_OUTPUT_TOKENS = 64  # decode steps over which a neighbour's load is felt; only weighs queue against batch
MAX_EJECTED_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What the gateway last knew of a worker. `num_inflight*` is this gateway's own count of what it sent and the
    worker's report may not show yet."""

    worker_id: str
    address: str
    boot_id: bytes = b""
    revision: str = ""
    layout_fingerprint: str = ""
    numerics_fingerprint: str = ""
    is_draining: bool = False
    is_suspect: bool = False  # failed lately: used only where nothing better is left
    is_reserved: bool = False  # held for a request that must run alone
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_inflight: int = 0
    num_inflight_tokens: int = 0  # prompt tokens sent and without a first token
    max_num_seqs: int = 0
    free_share: float = 1.0  # of KV blocks
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0
    max_model_len: int = 0  # of prompt and output together; 0: it does not say

    def takes(self, num_tokens: int) -> bool:
        return not self.max_model_len or num_tokens <= self.max_model_len

    @property
    def rate(self) -> float:
        return self.prefill_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S

    @property
    def num_ahead(self) -> int:
        return max(self.num_running + self.num_waiting, self.num_inflight)

    @property
    def num_tokens_ahead(self) -> int:
        return max(self.num_waiting_tokens, self.num_inflight_tokens)


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What the router needs to know of a request."""

    num_prompt_tokens: int
    num_output_tokens: int = 1  # that a worker must have room for
    cached_tokens: Mapping[str, int] = field(default_factory=dict[str, int])  # worker id -> tokens believed cached
    avoid: Collection[str] = ()
    numerics_fingerprint: str | None = None  # deterministic failover: only a worker that computes the same bits
    layout_fingerprint: str | None = None
    alone: bool = False
    ttft_objective_s: float = 0.0
    only_worker: str | None = None  # probes of the internal port
    only_revision: str | None = None  # so are these
    preference: Preference = field(default_factory=Preference)

    @property
    def is_forced(self) -> bool:
        return self.only_worker is not None or self.only_revision is not None


class NoRoute(Enum):
    """Why nothing is routable just now. Waiting is free; the deadline bounds it."""

    NO_WORKERS = "no decode worker is connected"
    TOO_LONG = "no decode worker takes a request of this length"
    DRAINING = "every decode worker is draining"
    RESERVED = "every decode worker is held for a request that must run alone"
    NUMERICS = "no decode worker computes with the numerics this request began with"
    BUSY = "no decode worker is idle, and this request must run alone"
    NOT_FOUND = "the forced worker is not connected"
    MEETING = "prefill workers are known and have not answered yet"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prefill worker in order of preference."""

    worker_id: str
    address: str
    boot_id: bytes
    predicted_queue_s: float
    prefill_tokens_per_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """The decision, with what it was based on."""

    worker_id: str
    predicted_ttft_s: float
    cached_tokens: int
    candidates: tuple[Candidate, ...]
    revision: str = ""
    meets_objective: bool = True


def route(request: RoutingRequest, decode: Sequence[WorkerState], prefill: Sequence[WorkerState]) -> Route | NoRoute:
    """Pick the revision, a decode worker of it, then that one's prefill candidates, of the same revision."""
    usable = _usable(request, of_one_revision(request, decode, prefill))
    if isinstance(usable, NoRoute):
        return usable
    best = min(usable, key=lambda worker: (_cost_s(request, worker), worker.num_ahead, worker.worker_id))
    candidates = rank_prefill(request, best, prefill)
    cached = _cached(request, best)
    local_s = (best.num_tokens_ahead + request.num_prompt_tokens - cached) / best.rate
    ttft_s = min([local_s, *(candidate.predicted_s for candidate in candidates)])
    objective = request.ttft_objective_s
    return Route(best.worker_id, ttft_s, cached, candidates, best.revision, not objective or ttft_s <= objective)


def rank_prefill(request: RoutingRequest, decode: WorkerState, prefill: Sequence[WorkerState]) -> tuple[Candidate, ...]:
    """Prefill workers of the decode worker's revision that take the prompt and whose KV fits, best first."""
    able = [p for p in prefill if not p.is_draining and p.takes(request.num_prompt_tokens)]
    kind = (decode.revision, decode.layout_fingerprint)
    same = [p for p in able if (p.revision, p.layout_fingerprint) == kind]
    ranked = sorted(
        (_candidate(request, worker) for worker in _without_suspects(same)),
        key=lambda candidate: (candidate.predicted_s, candidate.worker_id),
    )
    return tuple(ranked[:MAX_CANDIDATES])


def of_one_revision(
    request: RoutingRequest, decode: Sequence[WorkerState], prefill: Sequence[WorkerState]
) -> Sequence[WorkerState]:
    """The decode workers of the chosen revision; all of them where none is routable, so that the reason can be named.

    A request that has begun (its fingerprints are fixed) sees only revisions that can continue it.
    """
    if request.only_worker is not None:
        return decode
    if request.only_revision is not None:
        return [worker for worker in decode if worker.revision == request.only_revision]
    num_tokens = request.num_prompt_tokens + request.num_output_tokens
    able = [w for w in decode if not w.is_draining and w.takes(num_tokens) and _is_same_kind(request, w)]
    revision = choose(request.preference, able, prefill)
    return decode if revision is None else [worker for worker in decode if worker.revision == revision]


def _usable(request: RoutingRequest, decode: Sequence[WorkerState]) -> list[WorkerState] | NoRoute:
    """Workers that may run the request; the first empty step names the reason."""
    if request.only_worker is not None:
        return [worker for worker in decode if worker.worker_id == request.only_worker] or NoRoute.NOT_FOUND
    steps: tuple[tuple[NoRoute, Callable[[WorkerState], bool]], ...] = (
        (NoRoute.NO_WORKERS, lambda _: True),
        (NoRoute.TOO_LONG, lambda w: w.takes(request.num_prompt_tokens + request.num_output_tokens)),
        (NoRoute.DRAINING, lambda w: not w.is_draining),
        (NoRoute.RESERVED, lambda w: not w.is_reserved),
        (NoRoute.NUMERICS, lambda w: _is_same_kind(request, w)),
        (NoRoute.BUSY, lambda w: not request.alone or w.num_ahead == 0),
    )  # fmt: skip
    left = list(decode)
    for reason, keep in steps:
        left = [worker for worker in left if keep(worker)]
        if not left:
            return reason
    fresh = [worker for worker in left if worker.worker_id not in request.avoid]
    return _without_suspects(fresh or left)


def _is_same_kind(request: RoutingRequest, worker: WorkerState) -> bool:
    numerics = request.numerics_fingerprint
    layout = request.layout_fingerprint
    return (numerics is None or worker.numerics_fingerprint == numerics) and (
        layout is None or worker.layout_fingerprint == layout
    )


def _without_suspects(workers: Sequence[WorkerState]) -> list[WorkerState]:
    """Drop outliers, unless that would drop more than half: then the fault is probably not theirs."""
    healthy = [worker for worker in workers if not worker.is_suspect]
    num_ejected = len(workers) - len(healthy)
    return healthy if healthy and num_ejected <= max(1, len(workers) * MAX_EJECTED_SHARE) else list(workers)


def _cached(request: RoutingRequest, worker: WorkerState) -> int:
    return min(request.cached_tokens.get(worker.worker_id, 0), request.num_prompt_tokens)


def _cost_s(request: RoutingRequest, worker: WorkerState) -> float:
    """Seconds of waiting that this choice is predicted to cost."""
    prefill_s = (worker.num_tokens_ahead + request.num_prompt_tokens - _cached(request, worker)) / worker.rate
    step_s = worker.step_s or DEFAULT_STEP_S
    seats = worker.max_num_seqs or 64
    crowding_s = EXPECTED_OUTPUT_TOKENS * step_s * worker.num_ahead / seats
    queue_s = EXPECTED_OUTPUT_TOKENS * step_s * max(0, worker.num_ahead + 1 - seats) / seats
    memory_s = step_s * EXPECTED_OUTPUT_TOKENS * max(0.0, 0.1 - worker.free_share) * 10
    return prefill_s + crowding_s + queue_s + memory_s


def _candidate(request: RoutingRequest, worker: WorkerState) -> Candidate:
    queue_s = worker.num_tokens_ahead / worker.rate
    work_s = (request.num_prompt_tokens - _cached(request, worker)) / worker.rate
    return Candidate(
        worker.worker_id, worker.address, worker.boot_id, queue_s, worker.prefill_tokens_per_s, queue_s + work_s
    )


# ---------------------------------------------------------------- who has which prefix


class PrefixRecord:
    """Which worker was sent which prompt blocks: approximate, bounded, wrong at worst by a slower first token.

    Blocks are chained hashes, so an entry stands for the whole prefix up to it. The least recently used go first.
    """

    def __init__(self, block_size: int = 64, max_blocks: int = 65_536) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._workers: OrderedDict[int, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workers)

    def chain(self, token_ids: Sequence[int], salt: bytes) -> list[int]:
        """Hash of each full block's whole prefix."""
        size = self._block_size
        data = np.asarray(token_ids, dtype=np.uint32)
        link = xxhash.xxh3_64_intdigest(salt)
        chain: list[int] = []
        for start in range(0, len(data) - size + 1, size):
            link = xxhash.xxh3_64_intdigest(data[start : start + size].tobytes(), seed=link)
            chain.append(link)
        return chain

    def match(self, chain: Sequence[int]) -> dict[str, int]:
        """Tokens of the prefix that each worker is believed to have."""
        held: dict[str, int] = {}
        candidates: set[str] | None = None
        for number, link in enumerate(chain, start=1):
            workers = self._workers.get(link)
            candidates = set() if not workers else (set(workers) if candidates is None else candidates & workers)
            if not candidates:
                break
            self._workers.move_to_end(link)
            for worker_id in candidates:
                held[worker_id] = number * self._block_size
        return held

    def note(self, chain: Iterable[int], worker_ids: Iterable[str]) -> None:
        """The prompt was sent to these workers."""
        names = set(worker_ids)
        for link in chain:
            self._workers.setdefault(link, set()).update(names)
            self._workers.move_to_end(link)
        while len(self._workers) > self._max_blocks:
            self._workers.popitem(last=False)

    def forget(self, worker_id: str) -> None:
        """The worker died or restarted: its cache is gone."""
        for link in [link for link, workers in self._workers.items() if worker_id in workers]:
            workers = self._workers[link]
            workers.discard(worker_id)
            if not workers:
                del self._workers[link]

"""What a worker measures about its engine and about KV on the move. Values come in as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from prometheus_client import Counter

from servicekit.metrics import ITERATION_TOKEN_BUCKETS, PHASE_BUCKETS, TOKEN_COUNT_BUCKETS, TRANSFER_BUCKETS, Metrics


class LoadFacts(Protocol):
    """The fields of an engine's load snapshot that are shown (engine.messages.EngineLoad)."""

    @property
    def step_counter(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_waiting_tokens(self) -> int: ...
    @property
    def num_blocks_free(self) -> int: ...
    @property
    def num_blocks_total(self) -> int: ...
    @property
    def num_promised(self) -> int: ...
    @property
    def num_filling(self) -> int: ...
    @property
    def num_held_tokens(self) -> int: ...
    @property
    def num_blocks_in(self) -> Mapping[str, int]: ...
    @property
    def prefill_tokens_per_s(self) -> float: ...
    @property
    def num_swapped(self) -> int: ...
    @property
    def num_host_blocks_free(self) -> int: ...
    @property
    def num_host_blocks_total(self) -> int: ...


class CounterFacts(Protocol):
    """Totals that only grow (engine.messages.EngineCounters)."""

    steps: int
    prompt_tokens: int
    cached_tokens: int
    preemptions: int
    swap_outs: int
    swap_ins: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    recomputed_tokens: int
    copied_blocks: int
    evicted_blocks: int


class EndFacts(Protocol):
    """What a request cost (engine.messages.RequestStats)."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_stop: int
    num_length: int
    num_abort: int
    queue_s: float
    prefill_s: float
    total_s: float


class ReplicaFacts(Protocol):
    """What of a replica never changes and is shown (engine.worker.ReplicaIdentity)."""

    @property
    def block_size(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def kernels(self) -> str: ...
    @property
    def device(self) -> str: ...


class EngineMetrics:
    """vLLM's names for what an engine does, and ours for what vLLM has no name for."""

    def __init__(self, metrics: Metrics, replica: ReplicaFacts) -> None:
        self._running = metrics.vllm_gauge("num_requests_running", "Sequences in the running batch.")
        self._waiting = metrics.vllm_gauge("num_requests_waiting", "Requests waiting to be scheduled.")
        self._usage = metrics.vllm_gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._totals: dict[str, Counter] = {
            "prompt_tokens": metrics.vllm_counter("prompt_tokens", "Prompt tokens taken in."),
            "preemptions": metrics.vllm_counter("num_preemptions", "Sequences preempted."),
            "cached_tokens": metrics.vllm_counter("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
            "steps": metrics.counter("baton_engine_steps", "Engine steps."),
            "swap_outs": metrics.counter("baton_swap_outs", "Preemptions that kept the KV, in cache or host memory."),
            "swap_ins": metrics.counter("baton_swap_ins", "Sequences that came back with the KV that was kept."),
            "swapped_out_blocks": metrics.counter("baton_swapped_out_blocks", "Blocks copied to host memory."),
            "swapped_in_blocks": metrics.counter("baton_swapped_in_blocks", "Blocks copied back from host memory."),
            "recomputed_tokens": metrics.counter("baton_recomputed_tokens", "Tokens computed again after preemption."),
            "copied_blocks": metrics.counter("baton_copied_blocks", "Blocks copied on write."),
            "evicted_blocks": metrics.counter("baton_evicted_blocks", "Cached blocks evicted."),
        }
        self._generated = metrics.vllm_counter("generation_tokens", "Tokens generated.")
        # vLLM counts a query per prompt token that was looked up: each prompt is looked up once, whole.
        self._queries = metrics.vllm_counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._told: dict[str, int] = dict.fromkeys(self._totals, 0)
        self._queue_s = metrics.vllm_histogram("request_queue_time_seconds", "Time until scheduled.", PHASE_BUCKETS)
        self._prefill_s = metrics.vllm_histogram(
            "request_prefill_time_seconds", "From scheduled to the first token.", PHASE_BUCKETS
        )
        self._total_s = metrics.vllm_histogram("request_inference_time_seconds", "Time in this worker.", PHASE_BUCKETS)
        self._prompt = metrics.vllm_histogram("request_prompt_tokens", "Prompt tokens.", TOKEN_COUNT_BUCKETS)
        self._output = metrics.vllm_histogram("request_generation_tokens", "Output tokens.", TOKEN_COUNT_BUCKETS)
        self._iteration = metrics.vllm_histogram(
            "iteration_tokens_total", "Tokens computed per step.", ITERATION_TOKEN_BUCKETS
        )
        self._success = metrics.vllm_labelled_counter("request_success", "Choices by finish", ("finished_reason",))
        self._speed = metrics.gauge("baton_prefill_tokens_per_second", "Measured prefill speed; 0 while unknown.")
        self._blocks = metrics.gauge(
            "baton_kv_blocks", "KV blocks by state; at rest all are free or cached.", ("state",)
        )
        self._swapped = metrics.gauge("baton_swapped_sequences", "Of those waiting, sequences whose KV was kept.")
        self._host_blocks = metrics.gauge(
            "baton_host_blocks", "Host blocks for preempted sequences by state; at rest all are free.", ("state",)
        )
        self._block_bytes = replica.block_bytes
        self._swapped_bytes = metrics.counter("baton_swapped_bytes", "KV copied to and from the host.", ("direction",))
        self._waiting_tokens = metrics.gauge("baton_waiting_tokens", "Prompt tokens still to prefill.")
        info = metrics.gauge(
            "vllm:cache_config_info", "KV cache configuration.", ("block_size", "num_gpu_blocks", "cache_dtype")
        )
        info.labels(
            block_size=str(replica.block_size), num_gpu_blocks=str(replica.num_blocks), cache_dtype=replica.kv_dtype
        ).set(1)
        kernels = metrics.gauge("baton_kernels_info", "Which kernels run, and where.", ("kernels", "device"))
        kernels.labels(kernels=str(replica.kernels), device=str(replica.device)).set(1)
        self._attention_calls = metrics.counter(
            "baton_attention_calls", "Calls of each Triton attention kernel: one per layer and step.", ("kernel",)
        )
        self._told_calls: dict[str, int] = {}

    def observe_step(self, num_computed: int, num_generated: int = 0) -> None:
        """Tokens that a step computed, and those that were told; a first token drawn by P is told by D."""
        if num_computed:
            self._iteration.observe(num_computed)
        self._generated.inc(num_generated)

    def observe_end(self, stats: EndFacts) -> None:
        ends = {"stop": stats.num_stop, "length": stats.num_length, "abort": stats.num_abort}
        for reason, count in ends.items():
            if count:
                self._success.inc(count, finished_reason=reason)
        self._queue_s.observe(stats.queue_s)
        self._prefill_s.observe(stats.prefill_s)
        self._total_s.observe(stats.total_s)
        self._prompt.observe(stats.num_prompt_tokens)
        self._output.observe(stats.num_output_tokens)

    def update(self, load: LoadFacts, counters: CounterFacts, attention_calls: Mapping[str, int]) -> None:
        """Bring gauges and counters up to the engine's own numbers."""
        for kernel, total in attention_calls.items():
            self._attention_calls.labels(kernel=kernel).inc(total - self._told_calls.get(kernel, 0))
            self._told_calls[kernel] = total
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._usage.set(1.0 - load.num_blocks_free / max(1, load.num_blocks_total))
        for state, count in load.num_blocks_in.items():
            self._blocks.labels(state=state).set(count)
        self._swapped.set(load.num_swapped)
        self._host_blocks.labels(state="free").set(load.num_host_blocks_free)
        self._host_blocks.labels(state="used").set(load.num_host_blocks_total - load.num_host_blocks_free)
        for direction in ("out", "in"):
            name = f"swapped_{direction}_blocks"
            num_new = getattr(counters, name) - self._told[name]
            self._swapped_bytes.labels(direction=direction).inc(max(0, num_new) * self._block_bytes)
        self._speed.set(load.prefill_tokens_per_s)
        self._waiting_tokens.set(load.num_waiting_tokens)
        self._queries.inc(max(0, counters.prompt_tokens - self._told["prompt_tokens"]))
        for name, counter in self._totals.items():
            total = int(getattr(counters, name))
            counter.inc(max(0, total - self._told[name]))
            self._told[name] = total


class IgnoredMessages:
    """Counts messages that had no effect, from totals by kind."""

    def __init__(self, metrics: Metrics) -> None:
        self._counter = metrics.counter("baton_ignored_messages", "Messages without effect (T4).", ("kind",))
        self._told: dict[str, int] = {}

    def count(self, kind: str) -> None:
        self._counter.labels(kind=kind).inc()

    def update(self, totals: Mapping[str, int]) -> None:
        for kind, total in totals.items():
            self._counter.labels(kind=kind).inc(max(0, total - self._told.get(kind, 0)))
            self._told[kind] = total


class PrefillQueueMetrics:
    """A prefill worker's two of the four queues of a P/D system."""

    def __init__(self, metrics: Metrics) -> None:
        self._queue = metrics.gauge("baton_prefill_queue_requests", "Prompts queued at this prefill worker.")
        self._held = metrics.gauge("baton_prefill_held_requests", "Tickets whose KV is pinned for a decode worker.")
        self._held_tokens = metrics.gauge("baton_prefill_held_tokens", "Published tokens not yet released.")
        self._event_failures = metrics.counter(
            "baton_prefill_event_failures", "Engine events whose handling failed, and their prompts with it: bugs."
        )
        self._num_event_failures = 0
        self._ignored = IgnoredMessages(metrics)

    def update(self, load: LoadFacts, num_tickets: int, num_event_failures: int, ignored: Mapping[str, int]) -> None:
        self._event_failures.inc(num_event_failures - self._num_event_failures)
        self._num_event_failures = num_event_failures
        self._queue.set(load.num_waiting)
        self._held.set(num_tickets - load.num_waiting if num_tickets > load.num_waiting else 0)
        self._held_tokens.set(load.num_held_tokens)
        self._ignored.update(ignored)


class RingFacts(Protocol):
    """The ring of host memory beside a GPU's KV (kvtransfer.staging.StagingRing)."""

    num_slots: int

    @property
    def num_free(self) -> int: ...


class StagingMetrics:
    """KV on its way between a GPU's memory and transports. Without a ring nothing is, and all are 0."""

    def __init__(self, metrics: Metrics) -> None:
        self._slots = metrics.gauge(
            "baton_staging_slots", "Blocks of the staging ring by state; at rest all are free.", ("state",)
        )
        self._waiting = metrics.gauge(
            "baton_staging_waiting", "Prompts (prefill) or pulls (decode) that wait for room in the ring."
        )

    def update(self, ring: RingFacts | None, num_waiting: int) -> None:
        num_free = ring.num_free if ring is not None else 0
        self._slots.labels(state="free").set(num_free)
        self._slots.labels(state="used").set(ring.num_slots - num_free if ring is not None else 0)
        self._waiting.set(num_waiting)


VERIFICATION_KINDS = ("corrupt", "truncated", "stale", "layout")
"""kvtransfer.errors.FailureKind values that mean: what arrived is not what was announced (T2)."""


class DecodeQueueMetrics:
    """A decode worker's two of the four queues, its transfers and its decisions."""

    def __init__(self, metrics: Metrics) -> None:
        self._promised = metrics.gauge("baton_decode_promised_requests", "Requests that wait for P to start.")
        self._filling = metrics.gauge("baton_decode_filling_requests", "Requests whose KV is arriving.")
        self._transfers = metrics.counter("baton_transfers", "KV hand-overs.", ("transport", "outcome"))
        self._bytes = metrics.counter("baton_transfer_bytes", "KV bytes pulled.", ("transport",))
        self._seconds = metrics.histogram(
            "baton_transfer_seconds", "End of prefill to KV committed.", TRANSFER_BUCKETS, ("transport",)
        )
        self._failures = metrics.counter(
            "baton_verification_failures", "KV that was not what was announced (T2).", ("kind",)
        )
        self._placements = metrics.counter("baton_placements", "Where prompts went, and why.", ("path", "reason"))
        self._fallbacks = metrics.counter("baton_prefill_fallbacks", "Candidates given up, by failure.", ("reason",))
        self._stream_faults = metrics.counter(
            "baton_stream_faults", "Gateway streams cut because a message could not be handled."
        )
        self._transport_fallbacks = metrics.counter(
            "baton_transport_fallbacks",
            "A transport that was wanted did not work with a prefill worker.",
            ("transport",),
        )
        self._num_transport_fallbacks: dict[str, int] = {}
        self._pairs = metrics.gauge(
            "baton_transport_pairs", "Prefill workers that are connected, by the way KV comes.", ("transport",)
        )
        self._ways_seen: set[str] = set()
        self.ignored = IgnoredMessages(metrics)

    def update(
        self,
        load: LoadFacts,
        ignored: Mapping[str, int],
        transport_fallbacks: Mapping[str, int],
        transports: Mapping[str, int],
    ) -> None:
        self._ways_seen |= set(transports)
        for transport in self._ways_seen:
            self._pairs.labels(transport=transport).set(transports.get(transport, 0))
        for transport, total in transport_fallbacks.items():
            num_new = total - self._num_transport_fallbacks.get(transport, 0)
            self._transport_fallbacks.labels(transport=transport).inc(num_new)
            self._num_transport_fallbacks[transport] = total
        self._promised.set(load.num_promised)
        self.ignored.update(ignored)
        self._filling.set(load.num_filling)

    def count_stream_fault(self) -> None:
        self._stream_faults.inc()

    def count_placement(self, path: str, reason: str) -> None:
        self._placements.labels(path=path, reason=reason).inc()

    def count_transfer(self, transport: str, num_bytes: int, exposed_s: float) -> None:
        self._transfers.labels(transport=transport, outcome="committed").inc()
        self._bytes.labels(transport=transport).inc(num_bytes)
        self._seconds.labels(transport=transport).observe(exposed_s)

    def count_failure(self, kind: str) -> None:
        self._transfers.labels(transport="", outcome="failed").inc()
        self._fallbacks.labels(reason=kind).inc()
        if kind in VERIFICATION_KINDS:
            self._failures.labels(kind=kind).inc()


class Announcing(Protocol):
    @property
    def is_connected(self) -> bool: ...


def show_registries(metrics: Metrics, keepers: Sequence[Announcing]) -> None:
    """Nothing that is asked of this worker depends on it."""
    gauge = metrics.gauge("baton_registry_connected", "1 while the registry takes this worker's announcements.")
    gauge.set_function(lambda: float(all(keeper.is_connected for keeper in keepers)))


def count_startup(metrics: Metrics, phase_seconds: Mapping[str, float]) -> None:
    """Show how long each part of the start took."""
    gauge = metrics.gauge("baton_startup_phase_seconds", "Duration of a part of the start.", ("phase",))
    for phase, seconds in phase_seconds.items():
        gauge.labels(phase=phase).set(seconds)

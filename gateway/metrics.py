"""What the gateway counts: vLLM's names for what a frontend can know, `baton_gateway_*` for what is ours."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from servicekit import metrics as kit

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client.metrics_core import Metric

LABELS = ("model_name", "engine")
PARAM_N_BUCKETS = (1, 2, 5, 10, 20)


class HotHistogram:
    """A histogram for the per-token path: 0.3 us an observation; prometheus_client's takes 2 (it locks and walks)."""

    __slots__ = ("_bounds", "_counts", "_sum", "name", "text")

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.text = text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def family(self, labels: Sequence[str]) -> HistogramMetricFamily:
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(self.name, self.text, labels=LABELS)
        family.add_metric(labels, buckets, self._sum)
        return family


class _Hot(Collector):
    """Hands the hot histograms and the live gauges to prometheus_client at scrape time."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self.num_generation_tokens = 0
        self.histograms: list[HotHistogram] = []
        self.gauges: list[tuple[str, str, Callable[[], float], bool]] = []

    def collect(self) -> Iterable[Metric]:
        for histogram in self.histograms:
            yield histogram.family(self._labels)
        counter = CounterMetricFamily("vllm:generation_tokens", "Tokens committed", labels=LABELS)
        counter.add_metric(self._labels, float(self.num_generation_tokens))
        yield counter
        for name, text, read, is_vllm in self.gauges:
            gauge = GaugeMetricFamily(name, text, labels=LABELS if is_vllm else ())
            gauge.add_metric(self._labels if is_vllm else (), read())
            yield gauge


class GatewayMetrics:
    """One per process. Latencies are seconds since the request was received."""

    def __init__(self, model_name: str, engine: str = "0") -> None:
        self._kit = kit.Metrics(model_name, engine)
        self._hot = _Hot((model_name, engine))
        self._kit.registry.register(self._hot)
        hot = self._hot_histogram
        self.ttft = hot("time_to_first_token_seconds", "Received to first token sent", kit.TTFT_BUCKETS)
        self.itl = hot("inter_token_latency_seconds", "Gap between two tokens of a choice", kit.ITL_BUCKETS)
        self.tpot = hot("request_time_per_output_token_seconds", "(e2e - TTFT) / (tokens - 1)", kit.ITL_BUCKETS)
        self.e2e = hot("e2e_request_latency_seconds", "Received to last token", kit.PHASE_BUCKETS)
        self.queue = hot("request_queue_time_seconds", "Waiting at gateway and worker", kit.PHASE_BUCKETS)
        self.prefill = hot("request_prefill_time_seconds", "Prefill, wherever it ran", kit.PHASE_BUCKETS)
        self.decode = hot("request_decode_time_seconds", "First to last token", kit.PHASE_BUCKETS)
        self.inference = hot("request_inference_time_seconds", "Prefill and decode", kit.PHASE_BUCKETS)
        self.request_prompt_tokens = hot("request_prompt_tokens", "Prompt length", kit.TOKEN_COUNT_BUCKETS)
        self.request_generation_tokens = hot("request_generation_tokens", "Output length", kit.TOKEN_COUNT_BUCKETS)
        self.params_n = hot("request_params_n", "Choices asked for", PARAM_N_BUCKETS)
        self.params_max_tokens = hot("request_params_max_tokens", "max_tokens in force", kit.TOKEN_COUNT_BUCKETS)
        self.prompt_tokens = self._kit.vllm_counter("prompt_tokens", "Prompt tokens of answered requests")
        self.prompt_tokens_cached = self._kit.vllm_counter("prompt_tokens_cached", "Prompt tokens whose KV was cached")
        self.success = self._kit.vllm_labelled_counter("request_success", "Choices by finish", ("finished_reason",))
        self.rejections = self._kit.vllm_labelled_counter("admission_rejections", "Refused at admission", ("reason",))
        counter = self._kit.counter
        self.dropped = counter("baton_gateway_dropped_tokens", "Tokens that were not committed", ("reason",))
        self.attempts = counter("baton_gateway_attempts", "Attempts by how they ended", ("end",))
        self.failovers = counter("baton_gateway_failovers", "Attempts replayed on another worker", ("cause",))
        self.replayed = counter("baton_gateway_replayed_tokens", "Committed tokens sent again at failover")
        paths = ("path", "reason", "transport")
        self.paths = counter("baton_gateway_prefill_path", "Where prompts were prefilled, and why", paths)
        self.http = counter("baton_gateway_http_responses", "Responses by route and status", ("route", "status"))
        self.disconnects = counter("baton_gateway_client_disconnects", "Clients gone or cut", ("reason",))
        self.housekeeping_failures = counter(
            "baton_gateway_housekeeping_failures", "Parts of the upkeep that failed: bugs"
        )
        self.stream_ends = counter("baton_gateway_stream_ends", "Generate streams that ended", ("reason",))

    def gauge(self, name: str, text: str, read: Callable[[], float], *, is_vllm: bool = False) -> None:
        """A value read at scrape time."""
        self._hot.gauges.append((f"vllm:{name}" if is_vllm else f"baton_gateway_{name}", text, read, is_vllm))

    def count_token(self) -> None:
        """One token committed; per-token path, so a plain integer."""
        self._hot.num_generation_tokens += 1

    @property
    def registry(self) -> CollectorRegistry:
        return self._kit.registry

    def render(self) -> bytes:
        return self._kit.render()

    def _hot_histogram(self, name: str, text: str, bounds: Sequence[float]) -> HotHistogram:
        histogram = HotHistogram(f"vllm:{name}", text, bounds)
        self._hot.histograms.append(histogram)
        return histogram

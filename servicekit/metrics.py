"""Prometheus helpers: vLLM's bucket lists under vLLM's names, `baton_` for what is ours, one registry per process."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

# vLLM 0.33's buckets. The first three of ITL are ours: a tiny model on a laptop would fall into the first bucket whole,
# and a superset keeps every PromQL query working.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
ITL_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
PHASE_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKEN_COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
ITERATION_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TRANSFER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Makes metrics in one registry. `vllm_*` makers add vLLM's two labels with this process's values."""

    def __init__(self, model_name: str = "", engine: str = "0") -> None:
        disable_created_metrics()  # a second series beside each counter, which nobody asks for; vLLM has none either
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": engine}

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def vllm_gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def vllm_counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def vllm_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, tuple(self._labels), buckets=buckets, registry=self.registry)
        return histogram.labels(**self._labels)

    def vllm_labelled_counter(self, name: str, text: str, labels: tuple[str, ...]) -> LabelledCounter:
        counter = Counter(f"vllm:{name}", text, (*self._labels, *labels), registry=self.registry)
        return LabelledCounter(counter, dict(self._labels))

    def render(self) -> bytes:
        """The text that /metrics serves."""
        return generate_latest(self.registry)


class LabelledCounter:
    """A counter of vLLM's with labels beyond its two."""

    def __init__(self, counter: Counter, labels: dict[str, str]) -> None:
        self._counter = counter
        self._labels = labels

    def inc(self, amount: float = 1, **labels: str) -> None:
        self._counter.labels(**self._labels, **labels).inc(amount)

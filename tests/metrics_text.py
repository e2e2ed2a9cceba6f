"""What a process says at /metrics, to ask for sums; and whether a worker is at rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """One scrape."""

    samples: tuple[Sample, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        families = text_string_to_metric_families(text)
        return cls(tuple(Sample(s.name, s.labels, s.value) for family in families for s in family.samples))

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name that carry these labels."""
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())

    @property
    def is_at_rest(self) -> bool:
        """A worker's blocks are all free or cached, and no request or ticket is left."""
        pinned = sum(self.value("baton_kv_blocks", state=state) for state in ("reserved", "filled", "quarantined"))
        busy = (
            "vllm:num_requests_running", "vllm:num_requests_waiting", "baton_prefill_held_requests",
            "baton_prefill_queue_requests", "baton_prefill_held_tokens",
            "baton_decode_promised_requests", "baton_decode_filling_requests",
        )  # fmt: skip
        return not pinned and not any(self.value(name) for name in busy)

    @property
    def num_blocks_lost(self) -> float:
        """Blocks that are in no state, or in two (T8)."""
        (config,) = (s.labels for s in self.samples if s.name == "vllm:cache_config_info")
        return float(config["num_gpu_blocks"]) - self.value("baton_kv_blocks")

"""What a process says at /metrics, to ask for sums; and whether a worker is at rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented() -> dict[tuple[str, str], tuple[str, frozenset[str]]]:
    """docs/metrics.md: (process, name) to (type, labels)."""
    rows: dict[tuple[str, str], tuple[str, frozenset[str]]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            labels = frozenset(label.strip(" `") for label in cells[2].split(",") if label.strip())
            for process in cells[3].split(", "):
                rows[process, cells[0].strip("`")] = (cells[1], labels)
    return rows


def types_of(process: str, text: str) -> dict[str, str]:
    """Name to type of all that a process says, each sample held to the documented labels."""
    pages, found = documented(), dict[str, str]()
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = family.type
        for sample in family.samples:
            assert frozenset(sample.labels) - {"le"} == pages[process, name][1], (process, sample)
    return found


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

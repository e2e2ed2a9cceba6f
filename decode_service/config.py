"""Settings of one decode worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from servicekit.config import option
from workerkit.config import WorkerConfig, bytes_or_auto


class DisaggregationMode(Enum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    disaggregation: DisaggregationMode = option(
        DisaggregationMode.AUTO,
        help="where prompts are prefilled if their request says auto: auto, always (remote), never",
        metavar="MODE",
    )
    swap_memory: int | None = option(
        None,
        help="bytes of host memory that keep the KV of preempted sequences; 0: none, they are computed again; auto: "
        "none on the cpu, where KV is in host memory anyhow",
        parse=bytes_or_auto,
        metavar="BYTES|auto",
        minimum=0,
    )

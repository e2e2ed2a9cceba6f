"""Settings of one decode worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from servicekit.config import option
from workerkit.config import WorkerConfig


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

"""Settings of one prefill worker."""

from __future__ import annotations

from dataclasses import dataclass

from servicekit.config import option
from workerkit.config import WorkerConfig


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    max_held_tokens: int = option(
        65536, help="published tokens that decode workers have not taken yet; above it prompts wait", minimum=1
    )

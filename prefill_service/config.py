"""Settings of one prefill worker."""

from __future__ import annotations

from dataclasses import dataclass

from servicekit.config import option
from workerkit.config import WorkerConfig


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    # A step's blocks are published together at its end, so the last step is what a decode worker waits for, and an
    # urgent prompt waits for the step at hand. 192 costs 2.5 % of the speed of 512 (docs/log.md, "Steps of a prefill").
    max_num_batched_tokens: int = option(
        192,
        help="tokens in one step; fewer than a chunk and --max-num-seqs count as that many",
        minimum=1,
        maximum=1 << 20,
    )
    max_held_tokens: int = option(
        65536, help="published tokens that decode workers have not taken yet; above it prompts wait", minimum=1
    )

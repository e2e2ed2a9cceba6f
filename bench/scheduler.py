"""Microseconds of scheduling per engine step: scheduler, block pool and engine around a runner that computes nothing.

    python -m bench.scheduler [--json out.json]

Every sequence decodes; with `--waiting` (from 8 sequences on) another request waits that does not fit, so that
admission computes the future peak as often as it does in an overloaded engine.
The null runner's own time (one token object per sequence) is measured apart and subtracted nowhere, only shown.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

from engine.batch import Batch
from engine.config import EngineConfig, LengthEstimate
from engine.engine import Engine
from engine.messages import EngineRequest
from engine.request import SampledToken, SamplingParams

NUM_PROMPT_TOKENS = 512
NUM_SPARE_TOKENS = 256  # drawn by the first sequences while the last prompts are still computed
GOAL_US_AT_256 = 1000.0


class NullRunner:
    """Computes nothing and says token 7; measures what that costs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def execute(self, batch: Batch) -> list[SampledToken]:
        """One token per sampler."""
        began = time.perf_counter()
        tokens = [SampledToken(sampler.sequence_id, 7) for chunk in batch.chunks for sampler in chunk.samplers]
        self.seconds += time.perf_counter() - began
        return tokens

    def zero_slots(self, block_id: int, first_slot: int) -> None:
        """There is no memory."""


def make_engine(num_sequences: int, num_steps: int, waiting: bool) -> tuple[Engine, NullRunner]:
    """An engine in which `num_sequences` sequences decode, each with a prompt of its own."""
    num_tokens = NUM_PROMPT_TOKENS + num_steps + NUM_SPARE_TOKENS
    config = EngineConfig(
        num_blocks=num_sequences * -(-num_tokens // 16),
        max_model_len=max(num_sequences // 4, 1) * num_tokens,
        max_num_seqs=num_sequences + waiting,
        max_num_batched_tokens=8192 + num_sequences,
        chunk_size=512,
        length_estimate=LengthEstimate.MAXIMUM,  # so that the one that waits does not fit
    )
    runner = NullRunner()
    engine = Engine(config, runner)
    for key in range(num_sequences + waiting):
        length = (
            NUM_PROMPT_TOKENS if key < num_sequences else config.max_model_len - NUM_PROMPT_TOKENS
        )  # the one that waits is too long to fit
        prompt = tuple(key * 1000 + index % 997 for index in range(length))
        engine.match(EngineRequest(key, "bench", prompt, SamplingParams(max_tokens=num_steps + NUM_SPARE_TOKENS)))
        engine.start_local(key)
    while engine.step().num_decode_tokens < num_sequences:
        pass
    return engine, runner


def measure(num_sequences: int, num_steps: int, waiting: bool) -> dict[str, float]:
    """Median microseconds of one decode step, and of the null runner's part of it."""
    engine, runner = make_engine(num_sequences, num_steps, waiting)
    gc.collect()
    gc.freeze()  # as the services do after start-up
    samples: list[float] = []
    runner.seconds = 0.0
    cpu_began = time.thread_time()
    for _ in range(num_steps):
        began = time.perf_counter()
        result = engine.step()
        samples.append((time.perf_counter() - began) * 1e6)
        assert result.num_decode_tokens == num_sequences
    cpu_s = time.thread_time() - cpu_began
    gc.unfreeze()
    ordered = sorted(samples)
    return {
        "sequences": num_sequences,
        "us_per_step_p50": statistics.median(ordered),
        "us_per_step_p99": ordered[int(len(ordered) * 0.99)],
        "us_cpu_per_step": cpu_s * 1e6 / num_steps,
        "us_per_sequence": statistics.median(ordered) / num_sequences,
        "us_null_runner": runner.seconds * 1e6 / num_steps,
    }


def main() -> None:
    """Print the table; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--waiting", action="store_true", help="let a request wait for admission meanwhile")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    rows = [
        measure(count, arguments.steps, arguments.waiting)
        for count in arguments.sequences
        if count >= 8 or not arguments.waiting
    ]
    titles = ("p50 us/step", "p99 us/step", "cpu us/step", "us/sequence", "of it runner")
    print("  ".join(("sequences", *(f"{title:>12}" for title in titles))))
    for row in rows:
        count, *figures = row.values()
        print("  ".join((f"{count:>9.0f}", *(f"{figure:>12.2f}" for figure in figures))))
        if row["sequences"] == 256:
            verdict = "met" if row["us_per_step_p50"] <= GOAL_US_AT_256 else "missed"
            print(f"           goal at 256 sequences: <= {GOAL_US_AT_256:.0f} us per step: {verdict}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"scheduler": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

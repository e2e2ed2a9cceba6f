"""How long does the arrival of one long prompt stall the streams that run? Longest gap between two engine steps.

    python -m bench.long_prompt [--tokens 100000] [--json out.json]

Eight sequences decode on the engine's thread while prompts come, by turns in one run: a tiny one, for comparison, a
long one that is hashed in the step in which it comes, and one that is hashed beside it, as the services do. The runner
waits a millisecond per step without the interpreter, as a native one does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path

from bench.scheduler import NullRunner
from engine.batch import Batch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import EngineRequest
from engine.request import SampledToken, SamplingParams
from workerkit import engine_client
from workerkit.engine_client import EngineClient
from workerkit.process import SWITCH_INTERVAL_S

NUM_SEQUENCES = 8
STEP_S = 0.001
MAX_STEPS = 200_000


class TimedRunner(NullRunner):
    """Notes when each step began."""

    def __init__(self) -> None:
        super().__init__()
        self.began: list[float] = []

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Wait, then one token per sampler."""
        self.began.append(time.perf_counter())
        time.sleep(STEP_S)
        return super().execute(batch)


async def longest_gap_s(client: EngineClient, runner: TimedRunner, asked: EngineRequest) -> float:
    """The longest step while `asked` is matched."""
    await asyncio.sleep(0.05)
    del runner.began[:-1]  # the step at hand began before
    await client.begin(asked, Engine.match)
    await asyncio.sleep(0.02)
    gaps = [later - earlier for earlier, later in zip(runner.began, runner.began[1:], strict=False)]
    client.post(asked.key, lambda engine: engine.cancel(asked.key))
    return max(gaps)


async def measure(num_tokens: int, num_rounds: int) -> dict[str, float]:
    """Medians of the longest gap, in milliseconds."""
    config = EngineConfig(num_blocks=8 * num_tokens // 16 + 100_000, max_model_len=2 * num_tokens + MAX_STEPS)
    runner = TimedRunner()
    engine = Engine(config, runner)
    client = EngineClient(engine)
    client.start(lambda step: None, lambda: None)
    for key in range(NUM_SEQUENCES):
        await client.begin(EngineRequest(key, "b", (key, 2, 3), SamplingParams(max_tokens=MAX_STEPS)), Engine.match)
        await client.call(lambda engine, key=key: engine.start_local(key))
    at_once, gaps = engine_client.HASHED_AT_ONCE_TOKENS, {name: list[float]() for name in ("tiny", "in_step", "beside")}
    for number in range(num_rounds):
        for turn, name in enumerate(gaps):
            engine_client.HASHED_AT_ONCE_TOKENS = num_tokens if name == "in_step" else at_once
            length = 16 if name == "tiny" else num_tokens
            prompt = tuple(random.Random(f"{number} {name}").choices(range(100_000), k=length))
            asked = EngineRequest(1000 + 3 * number + turn, "b", prompt, SamplingParams())
            gaps[name].append(await longest_gap_s(client, runner, asked) * 1e3)
    await client.stop()
    figures = {f"{name}_ms": statistics.median(values) for name, values in gaps.items()}
    return {"tokens": num_tokens, **figures}


def main() -> None:
    """Print the figures; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as the workers do
    figures = asyncio.run(measure(arguments.tokens, arguments.rounds))
    print("  ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"long_prompt": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

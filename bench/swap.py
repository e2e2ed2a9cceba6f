"""What preemption costs: the same requests with memory for all of them, and with too little by recompute and by swap.

    python -m bench.swap [--model PATH] [--json out.json]

SmolLM2-135M's shape with random weights on the CPU, deterministic; admission is told that answers are short, so that
more are let in than the blocks will hold. The three take turns, so that a noisy neighbour hits all; the ratios are
medians over the rounds, by the clock and by processor time. All must say the same tokens.

On the CPU host memory is the KV's own kind: the figures say what the path costs and what recomputation wastes, nothing
of a bus between host and device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from bench.engine import random_checkpoint
from engine.config import EngineConfig, LengthEstimate
from engine.engine import Engine
from engine.kv_memory import KVMemory
from engine.messages import EngineRequest, TokenEvent
from engine.models.weights import SourceTensor
from engine.request import SamplingParams
from engine.runner import ModelRunner, kv_shape
from engine.swap_memory import SwapMemory
from modelfiles.config import ModelConfig
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights

BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 64
NUM_OUTPUT_TOKENS = 128


class Way(Enum):
    """How memory pressure is met."""

    NONE = "no pressure"
    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True, slots=True)
class Result:
    """One round of one way."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    preemptions: int
    recomputed_tokens: int
    blocks_out: int
    blocks_in: int
    copy_us: float


def serve(
    config: ModelConfig, weights: Mapping[str, SourceTensor], way: Way, num_requests: int, threads: int, prefix: bool
) -> tuple[Result, dict[int, list[int]]]:
    """All requests at once, to the end."""
    per_request = -(-(NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS) // BLOCK_SIZE)
    num_all = per_request * num_requests
    num_blocks = num_all if way is Way.NONE else num_all // 2
    kv = KVMemory(kv_shape(config, BLOCK_SIZE), num_blocks)
    swap = SwapMemory(kv.tensor, num_all) if way is Way.SWAP else None
    copy_s = swap.measure_copy_s() if swap else 0.0
    runner = ModelRunner(config, weights, kv, deterministic=True, num_threads=threads, swap=swap)
    engine_config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_requests,
        max_model_len=per_request * BLOCK_SIZE,
        prefix_caching=prefix,
        length_estimate=LengthEstimate.CONSTANT,
        constant_estimate=1,
        num_host_blocks=swap.num_blocks if swap else 0,
        host_copy_s=copy_s,
    )
    engine = Engine(engine_config, runner)
    said: dict[int, list[int]] = {key: [] for key in range(num_requests)}
    for key in said:
        prompt = tuple(
            3 + (key * 7919 + position * 31) % (config.vocab_size - 3) for position in range(NUM_PROMPT_TOKENS)
        )
        sampling = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        engine.match(EngineRequest(key, f"bench-{key}", prompt, sampling))
        engine.start_local(key)
    began, cpu_began = time.perf_counter(), time.process_time()
    while engine.has_work:
        for event in engine.step().events:
            if isinstance(event, TokenEvent):
                said[event.key].append(event.token.token_id)
    elapsed_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    engine.check()
    runner.close()
    counters = engine.counters
    result = Result(
        tokens_per_s=num_requests * NUM_OUTPUT_TOKENS / elapsed_s,
        tokens_per_cpu_s=num_requests * NUM_OUTPUT_TOKENS / cpu_s,
        preemptions=counters.preemptions,
        recomputed_tokens=counters.recomputed_tokens,
        blocks_out=counters.swapped_out_blocks,
        blocks_in=counters.swapped_in_blocks,
        copy_us=copy_s * 1e6,
    )
    return result, said


def main() -> None:
    """Run the rounds; print the table and the ratios; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers checkpoint (default: random weights)")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-prefix-cache", action="store_true", help="evicted or not, nothing is found again")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    rounds: list[dict[Way, Result]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or random_checkpoint(Path(folder))
        config, weights = load_config(path), open_weights(path)
        for _ in range(arguments.rounds):
            results: dict[Way, Result] = {}
            answers: list[dict[int, list[int]]] = []
            for way in Way:
                results[way], said = serve(
                    config, weights, way, arguments.requests, arguments.threads, not arguments.no_prefix_cache
                )
                answers.append(said)
            assert answers[0] == answers[1] == answers[2], "preemption changed a token"
            rounds.append(results)
    _print(rounds)
    if arguments.json:
        found = [{way.value: asdict(result) for way, result in results.items()} for results in rounds]
        arguments.json.write_text(json.dumps({"swap": found}, indent=2) + "\n")


def _print(rounds: list[dict[Way, Result]]) -> None:
    print(f"{'':12} {'tokens/s':>9} {'preempted':>10} {'recomputed':>11} {'blocks out':>11} {'blocks in':>10}")
    for way in Way:
        last = rounds[-1][way]
        speed = statistics.median(results[way].tokens_per_s for results in rounds)
        row = f"{way.value:12} {speed:9.1f} {last.preemptions:10} {last.recomputed_tokens:11}"
        print(f"{row} {last.blocks_out:11} {last.blocks_in:10}")
    for way in (Way.RECOMPUTE, Way.NONE):
        pairs = [(each[Way.SWAP], each[way]) for each in rounds]
        ratio = statistics.median(swap.tokens_per_s / other.tokens_per_s for swap, other in pairs)
        cpu_ratio = statistics.median(swap.tokens_per_cpu_s / other.tokens_per_cpu_s for swap, other in pairs)
        print(f"swap / {way.value}: x{ratio:.2f}, cpu x{cpu_ratio:.2f}")
    print(f"one block to the host or back: {rounds[-1][Way.SWAP].copy_us:.0f} us, as measured before the last round")


if __name__ == "__main__":
    main()

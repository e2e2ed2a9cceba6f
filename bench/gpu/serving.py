"""nano-vllm's benchmark through our engine: 256 requests at once, whose tokens per second are the figure.

Random prompts of 100 to 1024 tokens and outputs of 100 to 1024, temperature 0.6, Qwen3-0.6B's shape with random
weights, max_model_len 4096.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from bench.gpu.harness import Bench, Figure
from bench.gpu.step import BLOCK_SIZE, QWEN_06B, make_runner, tiny
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import EngineRequest, TokenEvent
from engine.request import SamplingParams
from engine.runner import ModelRunner
from modelfiles.config import ModelConfig

GOAL_TOKENS_PER_S = 26_000.0  # on an H200
DETERMINISTIC_GOAL = 0.9


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests, how long each part may be, and what a step may take."""

    num_requests: int
    lengths: tuple[int, int]
    max_model_len: int
    max_num_batched_tokens: int

    def requests(self, vocab_size: int) -> list[EngineRequest]:
        chance = random.Random(0)
        made: list[EngineRequest] = []
        for key in range(self.num_requests):
            prompt = tuple(chance.randrange(min(vocab_size, 10_000)) for _ in range(chance.randint(*self.lengths)))
            sampling = SamplingParams(
                max_tokens=chance.randint(*self.lengths), temperature=0.6, seed=key, ignore_eos=True
            )
            made.append(EngineRequest(key, f"r{key}", prompt, sampling))
        return made


def serving(bench: Bench) -> None:
    """The run in fast mode, then in deterministic mode if there is time for it."""
    load = Load(2, (3, 4), 32, 16) if bench.is_rehearsal else Load(256, (100, 1024), 4096, 16384)
    config = tiny(QWEN_06B) if bench.is_rehearsal else QWEN_06B
    if not bench.has_time(45):
        return
    fast = _tokens_per_s(bench, config, load, deterministic=False)
    case = f"Qwen3-0.6B, {load.num_requests} requests at once"
    bench.add(Figure(part="serving", case=case, unit="tokens/s", ours=fast, goal=GOAL_TOKENS_PER_S))
    if not bench.has_time(60):
        return
    fixed = _tokens_per_s(bench, config, load, deterministic=True)
    ratio = fixed / fast
    bench.add(Figure(part="fixed", case=case, unit="of its speed", ours=ratio, goal=DETERMINISTIC_GOAL))


def _tokens_per_s(bench: Bench, config: ModelConfig, load: Load, *, deterministic: bool) -> float:
    requests = load.requests(config.vocab_size)
    lengths = [len(each.prompt_token_ids) + each.sampling.max_tokens for each in requests]
    num_blocks = sum(-(-length // BLOCK_SIZE) + 1 for length in lengths)
    runner = make_runner(bench, config, num_blocks, load.num_requests, load.max_model_len, deterministic=deterministic)
    engine = _engine(config, runner, num_blocks, load)
    _serve(engine, [EngineRequest(10**6, "warm-up", requests[0].prompt_token_ids, SamplingParams(max_tokens=4))])
    started = time.perf_counter()
    num_tokens = _serve(engine, requests)
    took = time.perf_counter() - started
    mode = "deterministic" if deterministic else "fast"
    case = f"{mode}: steps that came as predicted of {engine.counters.steps}"
    share = runner.num_steps_ahead / engine.counters.steps
    bench.add(Figure(part="serving", case=case, unit="of all", ours=share))
    runner.close()
    return num_tokens / took


def _engine(config: ModelConfig, runner: ModelRunner, num_blocks: int, load: Load) -> Engine:
    settings = EngineConfig(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=load.max_model_len, max_num_seqs=load.num_requests,
        max_num_batched_tokens=load.max_num_batched_tokens, chunk_size=min(512, load.max_num_batched_tokens // 2),
        vocab_size=config.vocab_size, prefix_caching=False, reserve_ahead=runner.looks_ahead,
    )  # fmt: skip
    return Engine(settings, runner)


def _serve(engine: Engine, requests: list[EngineRequest]) -> int:
    """All of them to their ends; tokens drawn."""
    for request in requests:
        engine.match(request)
        engine.start_local(request.key)
    num_tokens = 0
    while engine.has_work:
        num_tokens += sum(isinstance(event, TokenEvent) for event in engine.step().events)
    return num_tokens

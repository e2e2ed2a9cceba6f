"""Kill workers under real streams and compare what the client got with the unfailed run. For CI and `make soak`."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.client import Outcome, stream_completion
from bench.service import Service, Worker

NUM_OUTPUT_TOKENS = 48
WORKLOADS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 7},
    "penalties": {"temperature": 0.7, "seed": 11, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
}
PROMPT = " ".join(
    f"Fact {i}: the river number {i} flows past town {i * 7 % 13} and {i * 5 % 11} hills." for i in range(12)
)


@dataclass(slots=True)
class Report:
    """What a run of kills did. `diverged` names request kinds whose text differed from the unfailed run."""

    num_kills: int = 0
    num_streams: int = 0
    failed: list[str] = field(default_factory=list[str])
    diverged: list[str] = field(default_factory=list[str])
    recovery_s: list[float] = field(default_factory=list[float])

    def __str__(self) -> str:
        worst = max(self.recovery_s, default=0.0)
        return (
            f"{self.num_kills} kills, {self.num_streams} streams: {len(self.failed)} failed, "
            f"{len(self.diverged)} diverged; slowest gap a client saw {worst:.2f} s"
        )


async def run_kills(service: Service, num_kills: int, seed: int) -> Report:
    """Per kill: three streams at once, a random worker killed after a random number of their tokens."""
    rng, report = random.Random(seed), Report()
    expected = {kind: (await _stream(service, kind)).text for kind in WORKLOADS}
    for number in range(num_kills):
        workers = [w for w in service.wait_all_ready() if w.role != "gateway"]
        victim, after_tokens = rng.choice(workers), rng.randrange(0, NUM_OUTPUT_TOKENS - 8)
        outcomes = await _streams_with_kill(service, victim, after_tokens)
        report.num_kills += 1
        for outcome in outcomes:
            report.num_streams += 1
            what = f"kill {number} of {victim.worker_id} after {after_tokens} tokens, {outcome.kind}"
            if not outcome.finished:
                report.failed.append(f"{what}: {outcome.error}")
            elif outcome.text != expected[outcome.kind]:
                report.diverged.append(f"{what}: {outcome.text!r} instead of {expected[outcome.kind]!r}")
            report.recovery_s.append(max([outcome.ttft_s, *outcome.gaps_s]) if outcome.token_times_s else 0.0)
    return report


async def _streams_with_kill(service: Service, victim: Worker, after_tokens: int) -> list[Outcome]:
    """Kill when the first stream has shown `after_tokens` pieces of text; 0 kills while the prompts are prefilled."""

    def kill_if_due(outcome: Outcome) -> None:
        if len(outcome.token_times_s) == after_tokens:
            os.kill(victim.pid, signal.SIGKILL)

    first, *others = WORKLOADS
    streams = [asyncio.create_task(_stream(service, first, kill_if_due))]
    streams += [asyncio.create_task(_stream(service, kind)) for kind in others]
    if after_tokens == 0:
        await asyncio.sleep(0.02)  # the prompts are on their way
        os.kill(victim.pid, signal.SIGKILL)
    return list(await asyncio.gather(*streams))


async def _stream(service: Service, kind: str, on_text: Callable[[Outcome], None] | None = None) -> Outcome:
    body: dict[str, object] = {
        "model": service.model_id,
        "prompt": PROMPT,
        "max_tokens": NUM_OUTPUT_TOKENS,
        "ignore_eos": True,
        **WORKLOADS[kind],
    }
    return await stream_completion(service.host, service.port, body, kind=kind, timeout_s=120, on_text=on_text)


def wait_until_gone(pids: list[int], timeout_s: float) -> list[int]:
    """The pids that still run after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False

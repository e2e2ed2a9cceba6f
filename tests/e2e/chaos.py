"""Kill workers under real streams and compare what the client got with the unfailed run. For CI and `make soak`."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.service import Service, Worker, is_alive
from tests.e2e.streams import OnTokens, Stream, open_stream

PROMPT = " ".join(
    f"Fact {i}: the river number {i} flows past town {i * 7 % 13} and {i * 5 % 11} hills." for i in range(12)
)


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request and what must come of it."""

    kind: str
    body: dict[str, Any]
    path: str = "/v1/completions"

    @property
    def num_choices(self) -> int:
        return int(self.body.get("n", 1))


def workloads(num_tokens: int) -> list[Workload]:
    """Every way in which a replay could go wrong: generator, penalties, several choices, logprobs, chat."""
    ask: dict[str, Any] = {"model": "model", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True}
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}]}
    chat |= {key: value for key, value in ask.items() if key != "prompt"}
    return [
        Workload("greedy", ask | {"temperature": 0}),
        Workload("seeded", ask | {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "seed": 7}),
        Workload(
            "penalties", ask | {"temperature": 0.7, "seed": 11, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
        ),
        Workload("two choices", ask | {"temperature": 1.0, "seed": 5, "n": 2, "logprobs": 2}),
        Workload("chat", chat | {"temperature": 0.8, "seed": 3, "logprobs": True}, "/v1/chat/completions"),
    ]


@dataclass(slots=True)
class Report:
    """What a run of kills did. `failed` and `diverged` say which streams, and how."""

    seed: int
    num_kills: int = 0
    num_streams: int = 0
    failed: list[str] = field(default_factory=list[str])
    diverged: list[str] = field(default_factory=list[str])
    slowest: Stream = field(default_factory=lambda: Stream("none"))

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.num_kills} kills, {self.num_streams} streams: {len(self.failed)} failed, "
            f"{len(self.diverged)} diverged; slowest gap a client saw {self.slowest.slowest_gap_s:.2f} s "
            f"({self.slowest.kind}, {self.slowest.request_id}, after {self.slowest.tokens_before_gap} tokens)"
        )


@dataclass(slots=True)
class Chaos:
    """Streams against one service, and what each must say. Deterministic services must say it byte for byte."""

    service: Service
    kinds: Sequence[Workload]
    deterministic: bool = True
    expected: dict[str, Stream] = field(default_factory=dict[str, Stream])
    first_token_s: float = 1.0
    last: list[Stream] = field(default_factory=list[Stream])  # of the newest round
    _salts: int = 0

    async def learn(self) -> None:
        """The unfailed run; and a stop string of each greedy answer that lies across tokens, as one kind more."""
        for workload in self.kinds:
            stream = await self.stream(workload)
            assert not stream.complaint(workload.num_choices), (workload.kind, stream)
            self.first_token_s = min(self.first_token_s, stream.first_gap_s)
            self.expected[workload.kind] = stream
        greedy = self.kinds[0]
        text = self.expected[greedy.kind].choices[0].text
        stop = text[len(text) * 2 // 3 :][:6]
        stopping = Workload("stop string", greedy.body | {"stop": [stop]})
        self.kinds = [*self.kinds, stopping]
        self.expected[stopping.kind] = await self.stream(stopping)
        assert self.expected[stopping.kind].choices[0].finish == "stop"

    async def stream(self, workload: Workload, on_tokens: OnTokens | None = None) -> Stream:
        """One request whose prompt nobody has cached."""
        self._salts += 1
        body = workload.body | {"cache_salt": f"salt-{os.getpid()}-{self._salts}"}
        return await open_stream(
            self.service.host, self.service.port, workload.path, body, kind=workload.kind, on_tokens=on_tokens
        )

    async def round(
        self, strike: Callable[[], None], *, after_tokens: int | None, after_s: float = 0.0, kinds: int = 3
    ) -> list[str]:
        """Some streams at once and one strike among them; returns what was wrong.

        The strike falls when one of the streams has shown `after_tokens` tokens, or, with None, `after_s` after the
        requests left.
        """
        chosen = [self.kinds[(self._salts + i) % len(self.kinds)] for i in range(kinds)]
        has_struck = False

        def strike_once() -> None:
            nonlocal has_struck
            if not has_struck:
                has_struck = True
                strike()

        def watch(stream: Stream) -> None:
            if after_tokens is not None and stream.num_tokens >= after_tokens:
                strike_once()

        streams = [asyncio.create_task(self.stream(workload, watch)) for workload in chosen]
        if after_tokens is None:
            await asyncio.sleep(after_s)
            strike_once()
        done = await asyncio.gather(*streams)
        assert has_struck, "no stream was that long"
        self.last = done
        return [word for workload, stream in zip(chosen, done, strict=True) if (word := self.judge(workload, stream))]

    def judge(self, workload: Workload, stream: Stream) -> str:
        """What is wrong with a stream, in words that begin with `failed` or `diverged`; empty if nothing."""
        complaint = stream.complaint(workload.num_choices)
        if complaint:
            return f"failed, {workload.kind}: {complaint}"
        expected = self.expected[workload.kind]
        if self.deterministic:
            return "" if stream.choices == expected.choices else f"diverged, {workload.kind}: {stream.choices}"
        if workload.kind != "stop string" and stream.num_usage_tokens != expected.num_usage_tokens:
            return f"failed, {workload.kind}: {stream.num_usage_tokens} tokens, not {expected.num_usage_tokens}"
        return ""


def kill(*workers: Worker) -> None:
    for worker in workers:
        assert worker.pid > 0, worker  # 0 would be this test's own process group
        os.kill(worker.pid, signal.SIGKILL)


async def run_kills(
    chaos: Chaos, num_kills: int, seed: int, num_tokens: int, say: Callable[[str], None] = print
) -> Report:
    """Random victims at random moments: P, D, or one of each at once; while prompts are prefilled or at any token."""
    rng, report = random.Random(seed), Report(seed)
    await chaos.learn()
    struck: set[int] = set()  # the supervisor may see an end later than the next round begins
    while report.num_kills < num_kills:
        ready = await asyncio.to_thread(wait_enough_ready, chaos.service, struck)
        victims = _victims(rng, ready)
        in_prefill = rng.random() < (0.6 if victims[0].role == "prefill" else 0.25)
        after_tokens = None if in_prefill else rng.randrange(1, num_tokens - 8)
        after_s = rng.uniform(0.0, 2.0) * chaos.first_token_s
        when = f"{after_s:.3f} s" if after_tokens is None else f"{after_tokens} tokens"
        wrong = await chaos.round(lambda chosen=victims: kill(*chosen), after_tokens=after_tokens, after_s=after_s)
        struck.update(victim.pid for victim in victims)
        report.num_kills += len(victims)
        report.num_streams += len(chaos.last)
        report.slowest = max([report.slowest, *chaos.last], key=lambda stream: stream.slowest_gap_s)
        for word in wrong:
            told = f"kill of {', '.join(v.worker_id for v in victims)} after {when}: {word}"
            say(told)
            (report.failed if word.startswith("failed") else report.diverged).append(told)
        say(f"{report.num_kills}/{num_kills} {report}")
    return report


def _victims(rng: random.Random, ready: Sequence[Worker]) -> list[Worker]:
    """One worker; one time in eight a P and a D at once. Never the last D: its streams would only wait."""
    prefill = [worker for worker in ready if worker.role == "prefill"]
    decode = [worker for worker in ready if worker.role == "decode"]
    if rng.random() < 0.125:
        return [rng.choice(prefill), rng.choice(decode)]
    return [rng.choice([*prefill, *decode])]


def wait_enough_ready(service: Service, struck: Collection[int] = (), timeout_s: float = 300.0) -> list[Worker]:
    """The ready workers but the pids in `struck`, once there are two decode workers and a prefill worker."""
    deadline = time.monotonic() + timeout_s
    while True:
        ready = [worker for worker in service.workers() if worker.state == "ready" and worker.pid not in struck]
        roles = [worker.role for worker in ready]
        if roles.count("decode") >= 2 and roles.count("prefill") >= 1 and "gateway" in roles:
            return [worker for worker in ready if worker.role != "gateway"]
        assert time.monotonic() < deadline, f"only {roles} are ready after {timeout_s:.0f} s"
        time.sleep(0.1)


def wait_until_gone(pids: list[int], timeout_s: float) -> list[int]:
    """The pids that still run after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left

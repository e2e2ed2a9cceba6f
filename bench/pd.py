"""P/D against colocated on the same two workers: does splitting prefill from decode keep the inter-token gaps short?

The same open-loop mix of chats (short prompt, steady stream wanted) and long prompts is sent to two services in turn,
each with two single-threaded workers on the same two cores:

  colocated      two decode workers that prefill for themselves (chunked, piggybacked on decode)
  disaggregated  one prefill worker and one decode worker; every prompt's KV is handed over
  auto           the same two; the decode worker decides for each prompt by the predicted cost

    python -m bench.pd [--seconds 60] [--repeats 3] [--modes colocated auto] [--json FILE]

Each repetition runs every mode over the same arrivals; the last lines are the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.client import Outcome, percentile, stream_completion
from bench.service import Service, running_service

CHAT_TOKENS, LONG_TOKENS, OUTPUT_TOKENS = 64, 1536, 48
TTFT_OBJECTIVE_S = {"chat": 1.0, "long": 6.0}
TPOT_OBJECTIVE_S = 0.100
MODES: dict[str, dict[str, Any]] = {
    "colocated": {"disaggregation": "Never", "prefill": 0, "decode": 2},
    "disaggregated": {"disaggregation": "Always", "prefill": 1, "decode": 1},
    "auto": {"disaggregation": "Auto", "prefill": 1, "decode": 1},
}


@dataclass(frozen=True, slots=True)
class Figures:
    """One mode under one mix. Seconds; goodput counts requests per second for which every objective held."""

    mode: str
    num_requests: int
    num_failed: int
    chat_ttft_p50_s: float
    chat_ttft_p99_s: float
    long_ttft_p50_s: float
    long_ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    itl_max_s: float
    goodput_per_s: float
    output_tokens_per_s: float


def arrivals(seconds: float, chats_per_s: float, longs_per_s: float, seed: int) -> list[tuple[float, str]]:
    """Poisson arrivals of both kinds, merged; the same for every mode."""
    rng = random.Random(seed)
    due: list[tuple[float, str]] = []
    for kind, rate in (("chat", chats_per_s), ("long", longs_per_s)):
        at = rng.expovariate(rate)
        while at < seconds:
            due.append((at, kind))
            at += rng.expovariate(rate)
    return sorted(due)


async def drive(service: Service, due: list[tuple[float, str]], seed: int) -> list[Outcome]:
    """Send every request when it is due, whatever the service does (open loop)."""
    rng = random.Random(seed)
    start = time.perf_counter() + 0.5

    async def one(at: float, kind: str, prompt: list[int]) -> Outcome:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        body: dict[str, object] = {
            "model": service.model_id,
            "prompt": prompt,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        return await stream_completion(service.host, service.port, body, kind=kind, due_s=start + at)

    # Prompts are random ids, so that no prefix cache helps either mode.
    tasks = [
        one(at, kind, [rng.randrange(1000, 40000) for _ in range(CHAT_TOKENS if kind == "chat" else LONG_TOKENS)])
        for at, kind in due
    ]
    return list(await asyncio.gather(*tasks))


def figures(mode: str, outcomes: list[Outcome]) -> Figures:
    good = [o for o in outcomes if o.finished and o.token_times_s]
    gaps = [gap for o in good for gap in o.gaps_s]
    first, last = min(o.sent_s for o in outcomes), max(o.token_times_s[-1] for o in good)
    met = sum(o.meets(TTFT_OBJECTIVE_S[o.kind], TPOT_OBJECTIVE_S) for o in outcomes)
    chats = [o.ttft_s for o in good if o.kind == "chat"]
    longs = [o.ttft_s for o in good if o.kind == "long"]
    return Figures(
        mode=mode,
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(good),
        chat_ttft_p50_s=percentile(chats, 50),
        chat_ttft_p99_s=percentile(chats, 99),
        long_ttft_p50_s=percentile(longs, 50),
        long_ttft_p99_s=percentile(longs, 99),
        itl_p50_s=percentile(gaps, 50),
        itl_p99_s=percentile(gaps, 99),
        itl_max_s=max(gaps, default=float("nan")),
        goodput_per_s=met / (last - first),
        output_tokens_per_s=sum(len(o.token_times_s) for o in good) / (last - first),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--chats-per-s", type=float, default=1.0)
    parser.add_argument("--longs-per-s", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    due = arrivals(args.seconds, args.chats_per_s, args.longs_per_s, args.seed)
    rows: dict[str, list[Figures]] = {mode: [] for mode in args.modes}
    for _ in range(args.repeats):
        for mode in args.modes:
            rows[mode].append(run_mode(mode, due, args.seed))
            print(format_row(rows[mode][-1]), flush=True)
    medians = [median(rows[mode]) for mode in args.modes]
    if args.repeats > 1:
        print(f"medians of {args.repeats}:", *map(format_row, medians), sep="\n")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in medians], indent=1))


def run_mode(mode: str, due: list[tuple[float, str]], seed: int) -> Figures:
    with running_service(num_threads=1, **MODES[mode]) as service:
        asyncio.run(drive(service, [(0.0, "chat"), (0.2, "long")], seed=0))  # warm-up, not counted
        return figures(mode, asyncio.run(drive(service, due, seed)))


def median(rows: list[Figures]) -> Figures:
    """Field by field."""
    columns = {name: [asdict(row)[name] for row in rows] for name in asdict(rows[0]) if name != "mode"}
    return Figures(mode=rows[0].mode, **{name: statistics.median(values) for name, values in columns.items()})


def format_row(row: Figures) -> str:
    return (
        f"{row.mode:14} {row.num_requests:3} requests ({row.num_failed} failed)  "
        f"chat TTFT p50 {row.chat_ttft_p50_s * 1e3:5.0f} p99 {row.chat_ttft_p99_s * 1e3:6.0f} ms  "
        f"long TTFT p50 {row.long_ttft_p50_s * 1e3:6.0f} p99 {row.long_ttft_p99_s * 1e3:6.0f} ms  "
        f"ITL p50 {row.itl_p50_s * 1e3:5.1f} p99 {row.itl_p99_s * 1e3:6.1f} max {row.itl_max_s * 1e3:6.0f} ms  "
        f"goodput {row.goodput_per_s:.2f}/s  {row.output_tokens_per_s:.0f} tok/s"
    )


if __name__ == "__main__":
    main()

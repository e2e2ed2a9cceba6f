"""What digests and generation checks take of a prompt's time to first token, with the real product beside.

TTFT is a service's own (`baton up`, SmolLM2, every prompt handed over). What safety adds to it is taken from the
hand-over of the same number of blocks in a prefill's order, in turn with digests and without them at both ends. Where a
medium checks generations by reads of its own (NIXL), two of them, before and after the last blocks, come on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import urllib.request

from bench.service import Service
from bench.transfer.cases import BLOCK_SIZE, Pace, most_rounds
from bench.transfer.decode import LOST, Bench, last_step_blocks
from bench.transfer.prefill import STEPPED, WITH_DIGESTS, WITHOUT_DIGESTS
from bench.transfer.table import Medium, Safety, median_ms
from kvtransfer.digest import block_digest

_ANSWER_S = 120.0
_VOCABULARY = range(1000, 20_000)


async def measure(bench: Bench, service: Service, num_tokens: int, pace: Pace) -> list[Safety]:
    """One for each medium. The bench's blocks must be those of the service's model."""
    with_digests: dict[Medium, list[float]] = {medium: [] for medium in bench.media}
    without: dict[Medium, list[float]] = {medium: [] for medium in bench.media}
    generations: list[float] = []
    ttfts: list[float] = []
    per_block: list[float] = []
    count = num_tokens // BLOCK_SIZE
    for number in pace.rounds(most_rounds(count)):
        ttfts.append(await asyncio.to_thread(_ttft_s, service, num_tokens, number))
        for how, found in ((WITH_DIGESTS, with_digests), (WITHOUT_DIGESTS, without)):
            await bench.peer.take_digests(how)
            for medium in bench.media:
                with contextlib.suppress(*LOST):  # on a machine this busy the other rounds are still worth something
                    found[medium].append(await bench.fetch(medium, count, STEPPED))
        await bench.peer.take_digests(WITH_DIGESTS)
        per_block += await asyncio.to_thread(_digest_times, bench, count)
        if bench.raw_nixl is not None:
            generations.append(await asyncio.to_thread(bench.raw_nixl.read_generations, last_step_blocks(num_tokens)))
    return [
        Safety(
            medium,
            num_tokens,
            len(ttfts),
            median_ms(ttfts),
            median_ms(with_digests[medium]) - median_ms(without[medium]),
            2 * median_ms(generations) if medium is Medium.NIXL else 0.0,
            2 * count * median_ms(per_block),
        )
        for medium in bench.media
        if with_digests[medium] and without[medium]
    ]


def _ttft_s(service: Service, num_tokens: int, number: int) -> float:
    """Of a prompt that nobody has cached, by the gateway's own clock."""
    draw = random.Random(1000 * num_tokens + number)
    body = {
        "model": service.model_id,
        "prompt": [draw.choice(_VOCABULARY) for _ in range(num_tokens)],
        "max_tokens": 1,
        "metrics": True,
    }
    posted = urllib.request.Request(
        f"{service.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(posted, timeout=_ANSWER_S) as reply:
        metrics = json.load(reply)["metrics"]
    assert metrics["prefill_path"] == "remote", metrics
    return metrics["time_to_first_token_ms"] / 1000


def _digest_times(bench: Bench, count: int) -> list[float]:
    seconds: list[float] = []
    for block in bench.rotated(count):
        started = time.perf_counter()
        block_digest(block)
        seconds.append(time.perf_counter() - started)
    return seconds

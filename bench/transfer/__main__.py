"""`make bench-transfer`: see bench/transfer/__init__.py."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil

import bench.transfer
from bench.service import Service, running_service
from bench.transfer import prefill, safety, table
from bench.transfer.cases import (
    BLOCK_BYTES,
    COUNTS,
    PROMPT_TOKENS,
    Pace,
    Shape,
    fitting,
    shape_for,
    weight,
)
from bench.transfer.decode import Bench, running_prefill
from bench.transfer.plot import svg
from bench.transfer.table import HEADER, Row, Safety
from kvtransfer import nixl_agent
from workerkit.process import SWITCH_INTERVAL_S

_HANDOVER_WEIGHT = 6.0  # beside cases.weight: most of its time are the pauses between steps
_SAFETY_SHARE = 0.25  # of the time
_SAFETY_SHAPE = "135M"  # SmolLM2's, which the service runs


async def run(
    cases: dict[str, list[int]], seconds: float, service: Service | None, end_service: Callable[[], None]
) -> tuple[list[Row], list[Safety]]:
    """Everything, smallest first, in about so many seconds after the start; says each row as soon as it is known."""
    shapes = [shape_for(name, counts) for name, counts in cases.items()]
    weights: list[float] = []
    for shape in shapes:
        weights += [weight(count * shape.block_bytes) for count in cases[shape.name]]
        weights += [_HANDOVER_WEIGHT] * len(PROMPT_TOKENS)
    rows: list[Row] = []
    safeties: list[Safety] = []
    destinations = memoryview(np.ones(max(shape.num_bytes for shape in shapes), np.uint8))  # page faults are not ours
    async with running_prefill(shapes) as peer:
        pace: Pace | None = None
        for number, shape in enumerate(shapes):
            bench = Bench(peer, shape, await peer.use(number), destinations)
            await bench.start()
            if service is not None and shape.name == _SAFETY_SHAPE:
                safeties = await _safeties(bench, service, _SAFETY_SHARE * seconds)
                seconds -= _SAFETY_SHARE * seconds
                await asyncio.to_thread(end_service)
            pace = pace or Pace(seconds, weights)
            print(HEADER, flush=True)
            for count in cases[shape.name]:
                rows += _said(await bench.moves(count, pace))
            for num_tokens in PROMPT_TOKENS:
                rows += _said(await bench.handovers(num_tokens, pace))
            await bench.aclose()
    return rows, safeties


async def _safeties(bench: Bench, service: Service, seconds: float) -> list[Safety]:
    found: list[Safety] = []
    pace = Pace(seconds, PROMPT_TOKENS)
    for num_tokens in PROMPT_TOKENS:
        of_length = await safety.measure(bench, service, num_tokens, pace)
        for each in of_length:
            print(table.safety_line(each), flush=True)
        found += of_length
    return found


def _service() -> contextlib.AbstractContextManager[Service]:
    transfer = "nixl" if nixl_agent.is_available() else "auto"
    return running_service(disaggregation="Always", transfer=transfer, num_threads=1, kv_memory="384Mi")


def _said(rows: list[Row]) -> list[Row]:
    for row in rows:
        print(table.line(row), flush=True)
    return rows


def _cases(names: Sequence[str], counts: Sequence[int]) -> dict[str, list[int]]:
    """What is moved of each shape; what does not fit into memory is left out, and said."""
    cases: dict[str, list[int]] = {}
    for name in names:
        cases[name], left_out = fitting(name, sorted(counts), psutil.virtual_memory().available)
        if left_out:
            print(left_out, flush=True)
        if not cases[name]:
            del cases[name]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=bench.transfer.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--serve", help=argparse.SUPPRESS)
    add("--shapes", nargs="+", default=list(BLOCK_BYTES), choices=list(BLOCK_BYTES))
    add("--blocks", type=int, nargs="+", default=list(COUNTS))
    add(
        "--seconds",
        type=float,
        default=400.0,
        help="about how long, after the start; each part has a round in any case",
    )
    add("--no-safety", action="store_true", help="leave out the share of TTFT, and with it the service with SmolLM2")
    add("--plot", type=Path, help="draw GB/s and shares of raw here, as SVG")
    add("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as the workers do
    if arguments.serve is not None:
        names = json.loads(arguments.serve)
        shapes = [Shape(name, BLOCK_BYTES[name], num) for name, num in zip(names, arguments.blocks, strict=True)]
        asyncio.run(prefill.serve(shapes))
        return
    shapes = sorted(arguments.shapes, key=list(BLOCK_BYTES).index)  # safety's first, before the time is shared out
    cases = _cases(shapes, arguments.blocks)
    if not cases:
        raise SystemExit("no shape fits into the memory that is available; choose fewer --blocks")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        is_safety_asked = not arguments.no_safety and _SAFETY_SHAPE in cases
        service = stack.enter_context(_service()) if is_safety_asked else None
        rows, safeties = asyncio.run(run(cases, arguments.seconds, service, stack.close))
    print(f"\nended in {time.monotonic() - began:.0f} s, load average {os.getloadavg()[0]:.1f}; goals:")
    for goal in table.goals(rows, safeties):
        print(f"  {goal.line()}")
    if arguments.plot is not None:
        arguments.plot.write_text(svg(rows))
        print(f"drawn: {arguments.plot}")
    if arguments.json is not None:
        document = {"rows": [asdict(row) for row in rows], "safety": [asdict(each) for each in safeties]}
        arguments.json.write_text(json.dumps(document, indent=1, default=lambda word: word.value))


if __name__ == "__main__":
    main()

"""Gateway: CPU per streamed token, end to end (goal <= 50 us).

    python -m bench.gateway [--streams 64] [--tokens 200] [--repeats 3] [--json out.json]

The gateway runs alone in its own process; this process holds the fake decode worker and the clients. Counted is the
gateway process's user + system time (psutil) from the first request sent to the last [DONE] read, over all streamed
tokens: HTTP parsing, validation, chat template, routing, gRPC, token log, detokenizing, SSE and sockets included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from bench.ports import free_port
from gateway.fake_decode_worker import FakeDecodeWorker, Script
from gateway.fake_model import write_fake_model

ROOT = Path(__file__).resolve().parent.parent
READY_S = 20.0
GOAL_US = 50.0


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement."""

    streams: int
    tokens: int
    wall_s: float
    gateway_cpu_s: float
    us_per_token: float
    tokens_per_s: float
    bytes_read: int


async def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        model = write_fake_model(Path(folder) / "model")
        async with FakeDecodeWorker(script=Script(step_s=options.step_ms / 1000)) as worker:
            port = free_port()
            gateway = await start_gateway(model, port, worker.address)
            try:
                await wait_until_ready(port)
                pid = gateway.pid
                await measure(pid, port, 8, 20)  # warm
                runs = [await measure(pid, port, options.streams, options.tokens) for _ in range(options.repeats)]
            finally:
                gateway.terminate()
                await gateway.wait()
    report(runs, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=10.0, help="pace of the fake worker's steps")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


async def start_gateway(model: Path, port: int, worker: str) -> asyncio.subprocess.Process:
    flags = ["--model", str(model), "--model-id", "bench", "--http", f"127.0.0.1:{port}", "--workers-seed", worker]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *flags, "--log-level", "warning", cwd=ROOT
    )


async def wait_until_ready(port: int) -> None:
    """Until it listens and has its worker."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError):
            if b"200 OK" in await fetch(port, b"GET /health HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n"):
                return
        await asyncio.sleep(0.05)
    raise TimeoutError("the gateway found no worker")


async def measure(pid: int, port: int, num_streams: int, num_tokens: int) -> Run:
    process = psutil.Process(pid)
    before, started = process.cpu_times(), time.perf_counter()
    answers = await asyncio.gather(*(stream(port, number, num_tokens) for number in range(num_streams)))
    wall_s, after = time.perf_counter() - started, process.cpu_times()
    num_chunks = sum(answer.count(b'"content":') for answer in answers) - num_streams  # less the role chunks
    assert num_chunks == num_streams * num_tokens, f"{num_chunks} chunks for {num_streams * num_tokens} tokens"
    assert all(answer.rstrip().endswith(b"0") and b"data: [DONE]" in answer for answer in answers)
    cpu_s = (after.user - before.user) + (after.system - before.system)
    total = num_streams * num_tokens
    return Run(num_streams, num_tokens, wall_s, cpu_s, cpu_s / total * 1e6, total / wall_s, sum(map(len, answers)))


async def stream(port: int, number: int, num_tokens: int) -> bytes:
    body = json.dumps(
        {"messages": [{"role": "user", "content": f"stream {number}"}], "max_tokens": num_tokens, "stream": True}
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: b\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    return await fetch(port, head % len(body) + body)


async def fetch(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def report(runs: list[Run], json_file: Path | None) -> None:
    median = statistics.median(run.us_per_token for run in runs)
    print(f"{'streams':>8} {'tokens':>7} {'wall s':>8} {'cpu s':>7} {'tokens/s':>9} {'us/token':>9}")
    for run in runs:
        print(
            f"{run.streams:>8} {run.tokens:>7} {run.wall_s:>8.2f} {run.gateway_cpu_s:>7.2f}"
            f" {run.tokens_per_s:>9.0f} {run.us_per_token:>9.1f}"
        )
    print(f"median {median:.1f} us of gateway CPU per streamed token (goal <= {GOAL_US:g})")
    if json_file:
        rows = {"median_us_per_token": median, "goal_us": GOAL_US, "runs": [asdict(run) for run in runs]}
        json_file.write_text(json.dumps({"gateway": rows}, indent=2) + "\n")


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())

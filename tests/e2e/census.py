"""What a service holds: blocks, descriptors, threads, mappings, sockets, files. Taken before chaos and after it."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.service import Service, Worker
from tests.metrics_text import Metrics


@dataclass(frozen=True, slots=True)
class Holdings:
    """One process. Mappings of memory files (`memfd:`) are KV memory and generation tables, its own and its peers'."""

    num_descriptors: int
    num_threads: int
    num_memory_files: int


def scrape(worker: Worker) -> Metrics:
    url = worker.http if "://" in worker.http else f"http://{worker.http}"
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as reply:
        return Metrics.parse(reply.read().decode())


def total(service: Service, name: str, role: str | None = None, **labels: str) -> float:
    """Sum of a metric over the service's processes (of one role)."""
    return sum(scrape(worker).value(name, **labels) for worker in service.workers(role))


def holdings(pid: int) -> Holdings:
    with open(f"/proc/{pid}/maps") as maps:
        memory_files = {line.split()[4] for line in maps if "memfd:" in line}
    return Holdings(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), len(memory_files))


def abstract_sockets(pids: Iterable[int]) -> set[str]:
    """Names of the unix sockets without a file that these processes hold, without the leading @."""
    held = {os.readlink(path) for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    return {name for inode, name in _abstract_names() if f"socket:[{inode}]" in held}


def every_abstract_socket() -> set[str]:
    """Those of every process in this network namespace."""
    return {name for _, name in _abstract_names()}


def _abstract_names() -> Iterator[tuple[str, str]]:
    with open("/proc/net/unix") as table:
        for words in map(str.split, table):
            if len(words) == 8 and words[7].startswith("@"):
                yield words[6], words[7][1:]


def eventually(what: str, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something that real processes bring about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


def at_rest(service: Service) -> None:
    """Wait until every block of every worker is free or cached, and nothing runs, waits, is promised or held."""
    workers = [worker for worker in service.wait_all_ready() if worker.role != "gateway"]
    for worker in workers:
        eventually(f"{worker.worker_id} is at rest", lambda worker=worker: scrape(worker).is_at_rest)
        assert scrape(worker).num_blocks_lost == 0, worker.worker_id
    assert total(service, "baton_gateway_dropped_tokens_total", role="gateway", reason="gap") == 0


def errors_in_logs(service: Service) -> list[str]:
    """What no process should ever say, whoever else died: errors, and tracebacks that nobody caught."""
    logs = sorted((service.run_dir / service.name / "logs").glob("*.log"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line for line in lines if line.startswith("Traceback") or line.split(" ")[1:2] in (["ERROR"], ["CRITICAL"])]

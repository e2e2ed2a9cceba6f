"""A real service for benchmarks and end-to-end tests: `baton up` as a user starts it, in a run folder of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Worker:
    """A row of `baton ps --json`."""

    worker_id: str
    role: str
    state: str
    pid: int
    http: str
    num_restarts: int


@dataclass(frozen=True, slots=True)
class Service:
    """A running service and the commands that a user has for it."""

    name: str
    host: str
    port: int
    model_id: str
    run_dir: Path
    environ: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def baton(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run a `baton` command against this service; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "baton", *arguments],
            env=dict(self.environ),
            text=True,
            capture_output=True,
            timeout=timeout_s,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"baton {' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def workers(self, role: str | None = None) -> list[Worker]:
        """Every process of the service, or those of one role (gateway, prefill, decode)."""
        rows = cast(list[dict[str, Any]], json.loads(self.baton("ps", "--json"))["processes"])
        return [
            Worker(r["worker_id"], r["role"], r["state"], r["pid"] or 0, r["http"], r["num_restarts"])
            for r in rows
            if role in (None, r["role"])
        ]

    def wait_all_ready(self, timeout_s: float = START_TIMEOUT_S) -> list[Worker]:
        deadline = time.monotonic() + timeout_s
        while True:
            workers = self.workers()
            if all(worker.state == "ready" for worker in workers):
                return workers
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all ready after {timeout_s:.0f} s: {workers}")
            time.sleep(0.1)

    def log(self, worker_id: str) -> str:
        return (self.run_dir / self.name / "logs" / f"{worker_id}.log").read_text(errors="replace")


@contextmanager
def running_service(
    *,
    prefill: int = 1,
    decode: int = 1,
    disaggregation: str = "Auto",
    deterministic: bool = False,
    num_threads: int | None = None,
    model: str = "smollm2",
    kv_memory: str | None = None,
    engine: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Generator[Service]:
    """`baton up` with this service until the block ends, then Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        stated = {"threads": num_threads, "kvMemory": kv_memory}
        pool = {key: value for key, value in stated.items() if value is not None}
        port = free_port()
        document = {
            "apiVersion": "serving.baton.dev/v1alpha1",
            "kind": "LLMService",
            "metadata": {"name": "bench"},
            "spec": {
                "model": {"source": model, "name": "model"},
                "pools": {"prefill": {"replicas": prefill, **pool}, "decode": {"replicas": decode, **pool}},
                "disaggregation": disaggregation,
                "deterministic": deterministic,
                "gateway": {"port": port},
                "engine": dict(engine or {}),
            },
        }
        file = Path(folder, "llmservice.yaml")
        file.write_text(yaml.safe_dump(document))
        service_environ = {**os.environ, **(environ or {}), "BATON_RUN_DIR": folder}
        service = Service("bench", "127.0.0.1", port, "model", Path(folder), service_environ)
        with Path(folder, "up.log").open("w+") as log:
            up = subprocess.Popen(
                [sys.executable, "-m", "baton", "up", "-f", str(file)],
                env=service_environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait_until_up(up, service, Path(folder, "up.log"))
                yield service
            finally:
                up.send_signal(signal.SIGINT)
                try:
                    up.wait(60)
                except subprocess.TimeoutExpired:
                    up.kill()
                    raise


def _wait_until_up(up: subprocess.Popen[bytes], service: Service, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if up.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"`baton up` did not come up:\n{log.read_text()}")
        try:
            service.wait_all_ready()
            return
        except (RuntimeError, TimeoutError):
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""A real service for benchmarks and end-to-end tests: `baton up` as a user starts it, in a run folder of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from baton.local.control import Command, ProcessView, Reply, Verb, send_command
from baton.local.errors import LocalError
from baton.local.rundir import RunDir
from bench.ports import free_port

START_TIMEOUT_S = 480.0


@dataclass(frozen=True, slots=True)
class Worker:
    """A row of `baton ps`."""

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
        """Every process of the service, or those of one role (gateway, prefill, decode): what `baton ps` shows.

        Asked for over the control socket: as a command it takes 0.3 s of a core, and who waits asks ten times a second.
        Raises: RuntimeError if the supervisor does not answer.
        """
        return [
            Worker(view.worker_id, view.role, _state_of(view), view.pid or 0, view.http, view.num_restarts)
            for view in self._ask().processes
            if role in (None, view.role)
        ]

    def is_up(self) -> bool:
        """Whether the supervisor has had its own first answer, the one that `baton up` times."""
        return self._ask().state == "ready"

    def _ask(self) -> Reply:
        try:
            return send_command(RunDir(self.run_dir / self.name), Command(Verb.PS), timeout_s=10.0)
        except (LocalError, OSError) as error:
            raise RuntimeError(f"no answer from the supervisor: {error}") from error

    def wait_all_ready(self, timeout_s: float = START_TIMEOUT_S) -> list[Worker]:
        deadline = time.monotonic() + timeout_s
        while True:
            workers = self.workers()
            if workers and all(worker.state == "ready" for worker in workers):
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
    transfer: str = "auto",
    environ: Mapping[str, str] | None = None,
) -> Generator[Service]:
    """`baton up` with this service until the block ends, then Ctrl-C."""
    stated = {"threads": num_threads, "kvMemory": kv_memory}
    pool = {key: value for key, value in stated.items() if value is not None}
    document: dict[str, Any] = {
        "apiVersion": "serving.baton.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": "bench"},
        "spec": {
            "model": {"source": model, "name": "model"},
            "pools": {"prefill": {"replicas": prefill, **pool}, "decode": {"replicas": decode, **pool}},
            "disaggregation": disaggregation,
            "deterministic": deterministic,
            "transfer": transfer,
            "gateway": {"port": free_port()},
            "engine": dict(engine or {}),
        },
    }
    with running_document(document, environ=environ) as service:
        yield service


@contextmanager
def running_document(document: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Generator[Service]:
    """The same with a whole LLMService, which states its model's name and its gateway's port."""
    name, spec = document["metadata"]["name"], document["spec"]
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        file = Path(folder, "llmservice.yaml")
        file.write_text(yaml.safe_dump(document))
        service_environ = {**os.environ, **(environ or {}), "BATON_RUN_DIR": folder}
        service = Service(
            name, "127.0.0.1", spec["gateway"]["port"], spec["model"]["name"], Path(folder), service_environ
        )
        with Path(folder, "up.log").open("w+") as log:
            up = subprocess.Popen(
                [sys.executable, "-m", "baton", "up", "-f", str(file)],
                env=service_environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_interrupt_with_parent,
            )
            try:
                _wait_until_up(up, service, Path(folder, "up.log"))
                yield service
            finally:
                up.send_signal(signal.SIGINT)
                try:
                    up.wait(120)
                except subprocess.TimeoutExpired:
                    up.kill()
                    raise


def _interrupt_with_parent() -> None:
    """In the child: get Ctrl-C when the test or benchmark is killed, so that no service outlives it (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGINT)


def _state_of(view: ProcessView) -> str:
    """The supervisor's word, except for a process that was killed a moment ago and counts as ready until it notices."""
    return view.state if view.state != "ready" or is_alive(view.pid or 0) else "killed"


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that was killed and is not waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until_up(up: subprocess.Popen[bytes], service: Service, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if up.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"`baton up` did not come up:\n{log.read_text()}")
        try:
            if service.is_up():
                return
        except RuntimeError:
            pass  # no supervisor yet
        time.sleep(0.2)

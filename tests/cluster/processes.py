"""Processes of a cluster: started with a log each, and gone with whoever started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.cluster.errors import StartFailed

RUN_VARIABLE = "BATON_CLUSTER_RUN"
# A node is up in 8 s on an idle machine of 2 cores; with 16 builds beside it each step took twenty times as long.
START_TIMEOUT_S = 180.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Processes:
    """What one supervisor runs. Ended by SIGKILL: nothing of a test cluster's state is kept."""

    def __init__(self, run: str, logs: Path) -> None:
        self._logs = logs
        self._environment = os.environ | {RUN_VARIABLE: run}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> int:
        """Start it and return its process id."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [os.fspath(word) for word in command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self._environment | dict(environment or {}), preexec_fn=end_with_parent,
            )  # fmt: skip
        self._running[name] = process
        return process.pid

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def check(self) -> None:
        """Raises: StartFailed naming the first process that ended by itself, with the end of its log."""
        for name, process in self._running.items():
            if (status := process.poll()) is not None:
                raise StartFailed(f"{name} ended with status {status}:\n{self._tail(name)}")

    def wait_for(
        self, what: str, is_true: Callable[[], bool], timeout_s: float = START_TIMEOUT_S, blame: str = ""
    ) -> None:
        """Wait until it is true.

        Raises: StartFailed when a process ends meanwhile, or after `timeout_s` with the end of the log of `blame`.
        """
        deadline = time.monotonic() + timeout_s
        while not is_true():
            self.check()
            if time.monotonic() > deadline:
                raise StartFailed(f"{what}: not after {timeout_s:.0f} s\n{self._tail(blame) if blame else ''}")
            time.sleep(0.05)

    def end(self) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _tail(self, name: str) -> str:
        log = self.log(name)
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "(no log)"


def end_with_parent() -> None:
    """In a child before exec: the kernel kills it when the thread that started it ends (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_processes_of(run: str) -> None:
    """Kill what a dead supervisor left: what has its run in the environment."""
    deadline = time.monotonic() + 60.0
    while left := [process for process in psutil.process_iter() if _is_of(process, run)]:
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue  # ended meanwhile
        if time.monotonic() > deadline:
            raise StartFailed(f"leftovers of run {run} do not end: {left}")
        time.sleep(0.02)


def _is_of(process: psutil.Process, run: str) -> bool:
    try:
        return process.environ().get(RUN_VARIABLE) == run and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False  # ended meanwhile, or another user's

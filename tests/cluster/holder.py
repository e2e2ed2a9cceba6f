"""A process that holds a cluster of its own, for tests that kill it and look for what it left."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.cluster import runs
from tests.cluster.forward import REPOSITORY
from tests.cluster.processes import RUN_VARIABLE

HOLD_A_CLUSTER = """
import sys, time
from tests.cluster.launch import running
with running(sys.argv[1]) as cluster:
    print(cluster.kubeconfig.parent.name, flush=True)
    time.sleep(600)
"""


def hold_a_cluster(tier: str) -> tuple[subprocess.Popen[str], str]:
    """A test run that holds a cluster, and the name of the cluster's run."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_CLUSTER, tier], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder.stdout:
        run = holder.stdout.readline().strip()
    assert run
    return holder, run


def supervisor_of(run: str) -> psutil.Process:
    return psutil.Process(int((runs.root() / run / "lock").read_text()))


def processes_of(run: str) -> list[psutil.Process]:
    """Processes that carry the run in their environment or on their command line."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_VARIABLE) == run or any(run in word for word in process.cmdline()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def until_gone(run: str) -> None:
    deadline = time.monotonic() + 120.0
    while left := [*processes_of(run), *Path("/sys/fs/cgroup").glob(f"*/{run}"), *runs.root().glob(run)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

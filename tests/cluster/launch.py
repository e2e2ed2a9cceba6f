"""Start a cluster for a test run or for a developer, and find one that runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster import build, runs
from tests.cluster.errors import ClusterError, StartFailed, Unavailable
from tests.cluster.forward import REPOSITORY
from tests.cluster.kube import NodeCluster
from tests.cluster.supervisor import CONNECTION_FILE, Connection

DETACHED_FILE = "detached"
"""Marks a cluster that outlives whoever started it."""
_END_TIMEOUT_S = 600.0
"""A node leaves 4 GB of unpacked images to remove: 2 s, and more than a minute at a load average of 35 on 2 cores."""
_ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Launched:
    """A supervisor that said ready."""

    cluster: NodeCluster
    process: subprocess.Popen[str]
    folder: Path


@contextmanager
def running(tier: str) -> Iterator[NodeCluster]:
    """A cluster of the tier for as long as the block runs; the existing one where USE_EXISTING_CLUSTER says so.

    Everything ends with the block, and with this process if it is killed.
    Raises: Unavailable where this machine cannot have it; StartFailed if it does not start, or if a part of it ended
    meanwhile.
    """
    if _wants_existing():
        yield existing_cluster()
        return
    read_end, write_end = os.pipe()
    try:
        launched = launch(tier, parent_fd=read_end)
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    try:
        yield launched.cluster
    finally:
        os.close(write_end)
        _wait_for_end(launched)


def launch(tier: str, parent_fd: int | None = None) -> Launched:
    """Start a supervisor and wait until its cluster is ready; without `parent_fd` it outlives this process."""
    build.find_tier(tier)  # the reason of a skip is better said before anything runs
    folder, lock = runs.new_run(tier)
    with lock:
        command = [
            sys.executable, "-m", "tests.cluster.supervisor",
            f"--tier={tier}", f"--folder={folder}", f"--lock-fd={lock.fileno()}",
        ]  # fmt: skip
        handed_on = [lock.fileno()]
        if parent_fd is not None:
            command.append(f"--parent-fd={parent_fd}")
            handed_on.append(parent_fd)
        else:
            (folder / DETACHED_FILE).touch()
        (folder / "logs").mkdir()
        with (folder / "logs" / "supervisor.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, pass_fds=handed_on, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
    assert process.stdout is not None
    said = json.loads(process.stdout.readline() or '{"failed": "the supervisor ended without a word"}')
    if "failed" in said:
        process.communicate(timeout=_END_TIMEOUT_S)
        raise StartFailed(said["failed"])
    return Launched(_cluster(Connection(**said["ready"])), process, folder)


def found() -> dict[Path, Connection]:
    """Clusters of this user that are ready, by folder."""
    files = {folder: folder / CONNECTION_FILE for folder in runs.live_runs()}
    return {folder: Connection(**json.loads(file.read_text())) for folder, file in files.items() if file.exists()}


def end(folder: Path) -> None:
    """End the cluster in this folder, whoever started it; neither it nor its supervisor is there afterwards."""
    supervisor = psutil.Process(int((folder / "lock").read_text()))
    supervisor.terminate()
    deadline = time.monotonic() + _END_TIMEOUT_S
    while folder.exists() or _runs(supervisor):
        if time.monotonic() > deadline:
            raise StartFailed(f"the supervisor {supervisor.pid} of {folder} does not end")
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    """Whether it still does something: where nobody reaps orphans an ended one stays as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def existing_cluster() -> NodeCluster:
    """The one that kubectl talks to by default; nothing of it is started, ended or cleaned up by us.

    Raises: Unavailable where there is no kubeconfig or kubectl, or where nobody answers.
    """
    kubeconfig = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    if not kubeconfig.is_file():
        raise Unavailable(f"USE_EXISTING_CLUSTER needs a kubeconfig; there is no {kubeconfig}")
    kubectl = shutil.which("kubectl") or build.find("kubectl")["kubectl"]
    cluster = NodeCluster(kubeconfig, Path(kubectl), url="", token="", ca_file=None, audit_log=None)
    try:
        cluster.kubectl("get", "--raw", "/readyz", f"--request-timeout={_ANSWER_TIMEOUT_S:.0f}s")
    except (ClusterError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"USE_EXISTING_CLUSTER: the cluster of {kubeconfig} does not answer: {error}") from error
    return cluster


def _wants_existing() -> bool:
    return os.environ.get("USE_EXISTING_CLUSTER", "").lower() in ("1", "true", "yes")


def _cluster(connection: Connection) -> NodeCluster:
    return NodeCluster(
        kubeconfig=Path(connection.kubeconfig),
        kubectl_program=build.find("kubectl")["kubectl"],
        url=connection.url,
        token=connection.token,
        ca_file=Path(connection.ca_file),
        audit_log=Path(connection.audit_log),
        init_pid=connection.init_pid,
        containerd_socket=Path(connection.containerd_socket) if connection.containerd_socket else None,
    )


def _wait_for_end(launched: Launched) -> None:
    """Raises: StartFailed with its words if a part of the cluster ended before it was told to."""
    try:
        rest, _ = launched.process.communicate(timeout=_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        launched.process.kill()
        launched.process.communicate()
        runs.clean_leftovers()
        raise StartFailed(f"the supervisor of {launched.folder} did not end in {_END_TIMEOUT_S:.0f} s") from None
    if rest:
        raise StartFailed(json.loads(rest)["failed"])

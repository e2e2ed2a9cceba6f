"""The operator against a real API server: how soon a change reaches its child, what a thousand services cost, and that
nothing is written at rest.

    python -m bench.operator --services 1 100 1000

Needs the test cluster (tests/cluster, control-plane tier). The controller manager is stopped while it measures, so that
what is measured is the operator and the API server, not the making of thousands of pods on the same two cores.
Times are from the PATCH of the spec, sent, to the watch event of the patched child, received.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import ssl
import statistics
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from baton_operator.objects import SERVICE_LABEL
from tests.cluster.kube import Cluster
from tests.cluster.launch import running
from tests.cluster.operator_world import Admin, Namespace, Operator, install, running_operator, until

SERVICES = "serving.baton.dev/v1alpha1"
MUTATING = {"create", "update", "patch", "delete", "deletecollection"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, nargs="+", default=[1, 100, 1000], metavar="N")
    parser.add_argument("--changes", type=int, default=200, metavar="N", help="spec changes measured at each size")
    parser.add_argument("--resyncs", type=int, default=10, metavar="N", help="resyncs that must write nothing")
    options = parser.parse_args()
    with running("control-plane") as cluster:
        admin = Admin(cluster)
        install(admin)
        for size in options.services:
            measure(cluster, admin, size, options.changes, options.resyncs)
        admin.close()


def measure(cluster: Cluster, admin: Admin, size: int, num_changes: int, num_resyncs: int) -> None:
    assert cluster.ca_file is not None
    namespace = Namespace(admin, f"bench-{size}")
    token = namespace.make()
    folder = Path(tempfile.mkdtemp(prefix="bench-operator-"))
    resync_s = max(5.0, size / 50)
    arguments = ("--namespace", namespace.name, "--resync-s", str(resync_s))
    with (
        without_controllers(),
        running_operator(Operator(cluster.url, cluster.ca_file, token, folder, *arguments)) as operator,
    ):
        until("synced", operator.is_synced)
        empty_mb = rss_mb(operator)
        converged_s = make_services(namespace, operator, size)
        print(f"\n{size} LLMServices: {converged_s:.1f} s from the first to the last converged, ", end="")
        print(f"{cpu_s(operator) / size * 1e3:.0f} ms of the operator's CPU for each", flush=True)
        latencies = sorted(changes(cluster, namespace, size, num_changes))
        p50, p99 = statistics.median(latencies), latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))]
        print(f"  spec change to child patched: p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms ({num_changes} changes)")
        wait_for_rest(operator)
        busy_s = cpu_s(operator)
        calls, elapsed = calls_of_resyncs(cluster, namespace, operator, num_resyncs)
        busy_s = cpu_s(operator) - busy_s
        reads = calls["list"] + calls["get"]
        writes = sum(calls[verb] for verb in MUTATING)
        hourly = reads / num_resyncs * 4 / size
        print(
            f"  {num_resyncs} resyncs in {elapsed:.0f} s: {writes} mutating calls, {reads} lists and gets, "
            f"{calls['watch']} watches, {busy_s / num_resyncs:.1f} s of CPU for each"
        )
        print(
            f"  at rest: {hourly:.2f} lists and gets per object and hour at 4 resyncs an hour, "
            "and 2 looks at its Secrets"
        )
        print(f"  memory: {rss_mb(operator):.0f} MB ({empty_mb:.0f} MB with none, {peak_mb(operator):.0f} MB at most)")
        restarted_s, restarted_mb = restart(operator)
        print(f"  restart: {restarted_s:.1f} s until everything is known, {restarted_mb:.0f} MB after it", flush=True)
        assert writes == 0, "a service at rest was written to"


def make_services(namespace: Namespace, operator: Operator, size: int) -> float:
    """Apply them and wait until each has all its children and says so."""
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: namespace.apply_service({}, f"s{number}"), range(size)))
    until("all seen", lambda: num_seen(namespace) == size, timeout_s=1800.0)
    elapsed = time.monotonic() - started
    wait_for_rest(operator)
    gateways = [name for name in namespace.deployments() if name.endswith("-gateway")]
    budgets = namespace.list("policy/v1", "poddisruptionbudgets")
    assert (len(gateways), len(budgets)) == (size, 3 * size), "not everything was made"
    return elapsed


def num_seen(namespace: Namespace) -> int:
    """How many have a status: it is written after everything else."""
    time.sleep(0.2)
    return sum("conditions" in (found.get("status") or {}) for found in namespace.list(SERVICES, "llmservices"))


def changes(cluster: Cluster, namespace: Namespace, size: int, count: int) -> Iterator[float]:
    """Seconds from each change of a spec to the event of its gateway Deployment."""
    chance, given = random.Random(size), Counter[str]()
    with watched_deployments(cluster, namespace) as seen:
        for _ in range(count):
            name = f"s{chance.randrange(size)}"
            given[name] = replicas = given[name] % 7 + 2  # always another number than before
            patch = {"spec": {"gateway": {"replicas": replicas}}}
            started = time.monotonic()
            namespace.admin.merge(namespace.path(SERVICES, "llmservices", name), patch)
            yield seen.wait_for(f"{name}-gateway", replicas, since=started) - started
            time.sleep(0.05)


class Seen:
    """When each Deployment was seen with how many replicas."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, int], float] = {}
        self._changed = threading.Condition()

    def add(self, name: str, replicas: int) -> None:
        with self._changed:
            self._times[name, replicas] = time.monotonic()
            self._changed.notify_all()

    def wait_for(self, name: str, replicas: int, since: float) -> float:
        with self._changed:
            if not self._changed.wait_for(lambda: self._times.get((name, replicas), 0.0) > since, 60.0):
                raise TimeoutError(f"{name} was not given {replicas} replicas in 60 s")
            return self._times[name, replicas]


@contextmanager
def watched_deployments(cluster: Cluster, namespace: Namespace) -> Iterator[Seen]:
    seen, address = Seen(), urllib.parse.urlsplit(cluster.url)
    path = namespace.path("apps/v1", "deployments")
    version = namespace.admin.call("GET", f"{path}?limit=1")["metadata"]["resourceVersion"]
    assert address.hostname is not None
    context = ssl.create_default_context(cafile=str(cluster.ca_file))
    connection = http.client.HTTPSConnection(address.hostname, address.port, context=context)
    query = f"?watch=1&resourceVersion={version}&labelSelector={SERVICE_LABEL}"
    connection.request("GET", path + query, headers={"Authorization": f"Bearer {cluster.token}"})
    stream = connection.getresponse()

    def read() -> None:
        try:
            for line in stream:
                found = json.loads(line)["object"]
                seen.add(found["metadata"]["name"], found["spec"]["replicas"])
        except (OSError, http.client.HTTPException, ValueError):
            return  # shut down below

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield seen
    finally:
        connection.sock.shutdown(socket.SHUT_RDWR)  # to close it would wait for the reader
        reader.join()
        connection.close()


def calls_of_resyncs(
    cluster: Cluster, namespace: Namespace, operator: Operator, count: int
) -> tuple[Counter[str], float]:
    """What the API server's audit log says that the operator called, kopf's own calls included."""
    assert cluster.audit_log is not None
    start = cluster.audit_log.stat().st_size
    started = time.monotonic()
    for _ in range(count):
        last = metric(operator, "baton_operator_last_resync_timestamp_seconds")
        until(
            "resync", lambda last=last: metric(operator, "baton_operator_last_resync_timestamp_seconds") > last, 300.0
        )
        wait_for_rest(operator)
    calls: Counter[str] = Counter()
    with cluster.audit_log.open() as log:
        log.seek(start)
        for line in log:
            if line.endswith("}\n"):
                event: dict[str, Any] = json.loads(line)
                if event["user"]["username"] == f"system:serviceaccount:{namespace.name}:baton-operator":
                    calls[event["verb"]] += 1
    return calls, time.monotonic() - started


def restart(operator: Operator) -> tuple[float, float]:
    operator.kill()
    started = time.monotonic()
    operator.start()
    until("synced", operator.is_synced, 300.0)
    elapsed = time.monotonic() - started
    wait_for_rest(operator)
    return elapsed, rss_mb(operator)


def wait_for_rest(operator: Operator) -> None:
    """Until nothing was looked at for three seconds."""
    seen = -1.0
    while (now := metric(operator, "baton_operator_reconcile_duration_seconds_count")) != seen:
        seen = now
        time.sleep(3.0)


def metric(operator: Operator, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", operator.http("/metrics"), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def cpu_s(operator: Operator) -> float:
    times = psutil.Process(operator.pid).cpu_times()
    return times.user + times.system


def rss_mb(operator: Operator) -> float:
    return psutil.Process(operator.pid).memory_info().rss / 2**20


def peak_mb(operator: Operator) -> float:
    text = Path(f"/proc/{operator.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def without_controllers() -> Iterator[None]:
    """Stop the controller managers that this process's cluster runs."""
    supervisors = psutil.Process().children(recursive=True)
    found = [process for process in supervisors if process.name().startswith("kube-controller")]
    assert found, "the test cluster runs a controller manager"
    for process in found:
        process.suspend()
    try:
        yield
    finally:
        for process in found:
            process.resume()


if __name__ == "__main__":
    main()

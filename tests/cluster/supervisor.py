"""Owner of one running cluster: starts it, watches it, and takes everything with it when it ends.

Started by `launch.py` as `python -m tests.cluster.supervisor`. It says one line of JSON on stdout when the cluster is
ready (`{"ready": {…}}`) or cannot be had (`{"failed": "…"}`), and one more when a part of it ends later. It ends on
SIGTERM, when the pipe from whoever started it closes (a killed test run closes it too), or with a part of the cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.cluster import build, control_plane, node, runs
from tests.cluster.errors import ClusterError
from tests.cluster.forward import forward_command
from tests.cluster.kube import write_kubeconfig
from tests.cluster.processes import Processes

CONNECTION_FILE = "cluster.json"
_CHECK_EVERY_S = 0.5


@dataclasses.dataclass(frozen=True)
class Connection:
    """What a client needs; written to `cluster.json` in the run's folder."""

    tier: str
    url: str
    token: str
    kubeconfig: str
    ca_file: str
    audit_log: str
    init_pid: int | None = None
    """Process whose namespaces are the node's."""
    containerd_socket: str | None = None


def start_control_plane(processes: Processes, folder: Path) -> Connection:
    programs = build.find_tier("control-plane")
    place = control_plane.loopback_place()
    endpoint = control_plane.start_api_server(processes, programs, folder, place)
    control_plane.wait_until_ready(processes, endpoint.url, endpoint)
    control_plane.start_controller_manager(processes, programs, place, endpoint)
    control_plane.wait_until_controllers_work(processes, endpoint.url, endpoint)
    return _connection("control-plane", folder, endpoint, endpoint.url)


def start_node(processes: Processes, folder: Path) -> Connection:
    programs = build.find_tier("node")
    init_pid, place = node.start_namespaces(processes, programs, folder)
    endpoint = control_plane.start_api_server(processes, programs, folder, place)
    socket = node.start_containerd(processes, programs, folder, place)
    url = f"https://127.0.0.1:{_start_forward(processes, init_pid, place)}"
    control_plane.wait_until_ready(processes, url, endpoint)
    control_plane.start_controller_manager(processes, programs, place, endpoint)
    node.start_cluster_services(processes, programs, folder, place, endpoint)
    node.start_kubelet(processes, programs, folder, place, endpoint, socket)
    control_plane.wait_until_controllers_work(processes, url, endpoint)
    objects = node.start_metrics_server(processes, programs, folder, place, endpoint)
    connection = _connection("node", folder, endpoint, url)
    kubectl = programs["kubectl"]
    processes.wait_for("metrics announced", lambda: _is_applied(kubectl, connection, objects), blame="kube-apiserver")
    processes.wait_for("node ready", lambda: _node_is_ready(kubectl, connection), blame="kubelet")
    # An API that is announced and does not answer holds up the deletion of every namespace.
    processes.wait_for("metrics ready", lambda: _metrics_answer(url, endpoint), blame="metrics-server")
    return dataclasses.replace(connection, init_pid=init_pid, containerd_socket=str(socket))


STARTS: dict[str, Callable[[Processes, Path], Connection]] = {
    "control-plane": start_control_plane,
    "node": start_node,
}


class _Ended(BaseException):
    """We were told to end. Not an Exception: nothing on the way up may take it for a failure of its own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.supervisor")
    parser.add_argument("--tier", choices=STARTS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lock-fd", type=int, required=True, help="lock of the folder, held until this process ends")
    parser.add_argument("--parent-fd", type=int, help="end when this pipe closes; without it on SIGTERM alone")
    options = parser.parse_args()
    os.set_inheritable(options.lock_fd, False)
    os.write(options.lock_fd, str(os.getpid()).encode())
    processes = Processes(options.folder.name, options.folder / "logs")
    try:
        _end_on_sigterm()
        if options.parent_fd is not None:
            _end_with_parent(options.parent_fd)
        connection = STARTS[options.tier](processes, options.folder)
        (options.folder / CONNECTION_FILE).touch(mode=0o600)
        (options.folder / CONNECTION_FILE).write_text(json.dumps(dataclasses.asdict(connection)))
        _say({"ready": dataclasses.asdict(connection)})
        _watch(processes)
    except _Ended:
        return 0
    except (ClusterError, subprocess.CalledProcessError, OSError) as error:
        _say({"failed": f"{type(error).__name__}: {error}"})
        return 1
    finally:
        processes.end()
        runs.remove(options.folder)


def _connection(tier: str, folder: Path, endpoint: control_plane.Endpoint, url: str) -> Connection:
    ca_file = endpoint.certificates.ca
    kubeconfig = write_kubeconfig(folder / "kubeconfig", url, ca_file, endpoint.token)
    return Connection(tier, url, endpoint.token, str(kubeconfig), str(ca_file), str(endpoint.audit_log))


def _start_forward(processes: Processes, init_pid: int, place: control_plane.Place) -> int:
    """The API server of the node, at a loopback port of this machine."""
    processes.start("forward", forward_command(init_pid, f"{place.address}:{place.api_port}"))
    log = processes.log("forward")
    processes.wait_for("forward listening", lambda: log.read_text().endswith("\n"), blame="forward")
    return int(log.read_text().split()[0])


def _is_applied(kubectl: Path, connection: Connection, objects: list[dict[str, object]]) -> bool:
    document = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    return _kubectl(kubectl, connection, "apply", "--server-side", "-f", "-", stdin=document) is not None


def _node_is_ready(kubectl: Path, connection: Connection) -> bool:
    path = "{.items[*].status.conditions[?(@.type=='Ready')].status}"
    return _kubectl(kubectl, connection, "get", "nodes", "-o", f"jsonpath={path}") == "True"


def _metrics_answer(url: str, endpoint: control_plane.Endpoint) -> bool:
    return control_plane.answers(url, endpoint, "/apis/metrics.k8s.io/v1beta1/nodes")


def _kubectl(kubectl: Path, connection: Connection, *arguments: str, stdin: str | None = None) -> str | None:
    """What it printed; None where it failed, to be asked again: on a busy machine an API server times out at first."""
    command = [kubectl, f"--kubeconfig={connection.kubeconfig}", "--request-timeout=30s", *arguments]
    said = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if said.returncode != 0:
        print(f"kubectl {' '.join(arguments)}: {said.stderr.strip()}", file=sys.stderr, flush=True)
        return None
    return said.stdout


def _say(line: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever started us is gone: nobody to tell
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def _end_on_sigterm() -> None:
    """Raise where we are, once: what follows is the cleaning up, which nothing may cut short."""

    def on_signal(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Ended

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started us, and reaches us through the pipe


def _end_with_parent(parent_fd: int) -> None:
    def wait() -> None:
        while os.read(parent_fd, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _watch(processes: Processes) -> NoReturn:
    """Until the signal. Raises: StartFailed when a part of the cluster ends."""
    while True:
        processes.check()
        time.sleep(_CHECK_EVERY_S)


if __name__ == "__main__":
    sys.exit(main())

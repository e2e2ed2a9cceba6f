"""A running cluster as tests see it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.errors import ClusterError, Unavailable
from tests.cluster.forward import forwarded
from tests.cluster.processes import end_with_parent

PATIENCE_S = 240.0
"""Of waits that end as soon as they can. A busy machine of 2 cores takes twenty times as long as an idle one."""


@dataclass(frozen=True)
class Cluster:
    """A Kubernetes API server with real controllers, and how to reach it as its administrator."""

    kubeconfig: Path
    kubectl_program: Path
    url: str
    token: str
    """Bearer token of an administrator; empty where the cluster is not ours (USE_EXISTING_CLUSTER)."""
    ca_file: Path | None
    audit_log: Path | None
    """One JSON line per request (audit.k8s.io/v1 Event, metadata only); None where the cluster is not ours."""

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = PATIENCE_S) -> str:
        """Run kubectl and return what it printed; again, where it timed out before it had asked for anything.

        Raises: ClusterError with kubectl's own words if it fails.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            said = subprocess.run(
                [self.kubectl_program, *arguments], input=stdin, env=self.environment(),
                capture_output=True, text=True, check=False, timeout=timeout_s,
            )  # fmt: skip
            if said.returncode == 0:
                return said.stdout
            if not _was_still_learning(said.stderr) or time.monotonic() > deadline:
                raise ClusterError(f"kubectl {' '.join(arguments)}: {said.stderr.strip()}")

    def get(self, *arguments: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply objects server-side, as one list."""
        document = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(document))

    def environment(self) -> dict[str, str]:
        """For child processes that find the cluster by KUBECONFIG (helm, the operator)."""
        return os.environ | {"KUBECONFIG": str(self.kubeconfig)}

    def wait_until(self, what: str, is_true: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Poll until it is true. Raises: ClusterError after the timeout, with what was waited for."""
        deadline = time.monotonic() + timeout_s
        while not is_true():
            if time.monotonic() > deadline:
                raise ClusterError(f"{what}: not after {timeout_s:.0f} s")
            time.sleep(0.1)


@dataclass(frozen=True)
class NodeCluster(Cluster):
    """A cluster with a node that runs pods."""

    init_pid: int | None = None
    """Process whose namespaces are the node's; None where the cluster is not ours."""
    containerd_socket: Path | None = None

    def run_inside(self, *command: str | Path, timeout_s: float = 120.0) -> str:
        """Run a program of this machine in the node's namespaces and return what it printed."""
        if self.init_pid is None:
            raise Unavailable("not our own node: nothing can be run beside its pods")
        prefix = ["nsenter", f"--target={self.init_pid}", "--mount", "--net", "--pid", "--"]
        said = subprocess.run(
            [*prefix, *command], capture_output=True, text=True, check=False, timeout=timeout_s,
            preexec_fn=end_with_parent,
        )  # fmt: skip
        if said.returncode != 0:
            raise ClusterError(f"{' '.join(map(str, command))}: {said.stderr.strip()}")
        return said.stdout

    def import_image(self, archive: Path, timeout_s: float = 600.0) -> None:
        """Make the images of an OCI archive (`buildah push NAME oci-archive:FILE:NAME:TAG`) known to the node.

        Pods name them as `NAME:TAG` with `imagePullPolicy: Never` or `IfNotPresent`. In a cluster that is not ours the
        command in BATON_LOAD_IMAGE does it, with the archive added (`kind load image-archive`).
        """
        if self.containerd_socket is not None:
            ctr = ("ctr", f"--address={self.containerd_socket}", "--namespace=k8s.io")
            self.run_inside(*ctr, "images", "import", archive, timeout_s=timeout_s)
        elif loader := os.environ.get("BATON_LOAD_IMAGE"):
            subprocess.run([*shlex.split(loader), archive], check=True, timeout=timeout_s)
        else:
            raise Unavailable("BATON_LOAD_IMAGE does not say how to load an image archive into the existing cluster")

    @contextmanager
    def forward_service(self, namespace: str, name: str, port: int) -> Iterator[str]:
        """`127.0.0.1:PORT` that leads to the Service as a client in the cluster sees it, load balancing included.

        In a cluster that is not ours it is `kubectl port-forward`, which leads to one of the pods.
        """
        if self.init_pid is not None:
            address = self.get("service", name, "-n", namespace)["spec"]["clusterIP"]
            with forwarded(self.init_pid, f"{address}:{port}") as local:
                yield f"127.0.0.1:{local}"
            return
        command = [self.kubectl_program, "port-forward", "-n", namespace, f"service/{name}", f":{port}"]
        with subprocess.Popen(command, env=self.environment(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().split()[2]  # "Forwarding from 127.0.0.1:40123 -> 8000"
            finally:
                process.kill()


def _was_still_learning(stderr: str) -> bool:
    """Whether kubectl gave up on the API server's schemas, for which it waits 32 s whatever it is told.

    After each change of a CRD the API server makes them anew, which a busy machine does not do in that time.
    """
    return "Client.Timeout exceeded" in stderr and ("validating data: Get" in stderr or "API group list" in stderr)


def write_kubeconfig(path: Path, url: str, ca_file: Path, token: str) -> Path:
    """JSON is YAML: no dumper needed. Readable by us alone, since it carries the administrator's token."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(ca_file)}}],
        "users": [{"name": "admin", "user": {"token": token}}],
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1))
    return path

"""etcd, API server and controller manager: how each is started, and when they are ready.

On the machine itself (the control-plane tier) they listen on free ports of loopback; for the node tier the same
commands run in the node's namespaces on fixed addresses.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.ports import free_ports
from tests.cluster.certificates import Certificates, make_certificates
from tests.cluster.kube import write_kubeconfig
from tests.cluster.processes import Processes

SERVICE_RANGE = "198.18.128.0/17"
API_SERVICE_IP = "198.18.128.1"
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    # Who asked for what is enough to count calls and to check RBAC against them; leases alone would drown it.
    "rules": [
        {"level": "None", "resources": [{"group": "coordination.k8s.io", "resources": ["leases"]}]},
        {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version"]},
        {"level": "Metadata"},
    ],
}


@dataclass(frozen=True)
class Place:
    """Where the processes run and which addresses they use."""

    prefix: tuple[str, ...]
    """Put before each command: nothing, or nsenter."""
    address: str
    """The API server's own."""
    etcd_port: int
    etcd_peer_port: int
    api_port: int
    with_endpoint: bool
    """Whether the Service `kubernetes` leads to the API server: only where pods can reach it."""


@dataclass(frozen=True)
class Endpoint:
    """A started API server and how to reach it as administrator."""

    url: str
    """From inside the place."""
    token: str
    certificates: Certificates
    kubeconfig: Path
    """For processes in the same place."""
    audit_log: Path


def loopback_place() -> Place:
    etcd, peer, api = free_ports(3)
    return Place((), "127.0.0.1", etcd, peer, api, with_endpoint=False)


def start_api_server(processes: Processes, programs: Mapping[str, Path], folder: Path, place: Place) -> Endpoint:
    """Start etcd and the API server; return at once (`wait_until_ready` waits)."""
    certificates = make_certificates(
        folder / "certificates",
        [f"IP:{address}" for address in {"127.0.0.1", place.address, API_SERVICE_IP}]
        + ["DNS:localhost", "DNS:kubernetes.default.svc", "DNS:kubernetes.default.svc.cluster.local"],
    )
    token = secrets.token_hex(16)
    (folder / "tokens.csv").touch(mode=0o600)
    (folder / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    (folder / "audit-policy.json").write_text(json.dumps(_AUDIT_POLICY))
    etcd = f"http://127.0.0.1:{place.etcd_port}"
    peer = f"http://127.0.0.1:{place.etcd_peer_port}"
    processes.start("etcd", [
        *place.prefix, programs["etcd"], f"--data-dir={folder / 'etcd'}", "--name=test",
        f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=test={peer}",
        # The data is thrown away at the end.
        "--unsafe-no-fsync", "--log-level=warn",
    ])  # fmt: skip
    audit_log = folder / "audit.log"
    processes.start("kube-apiserver", [
        *place.prefix, programs["kube-apiserver"], f"--etcd-servers={etcd}",
        f"--bind-address={'0.0.0.0' if place.with_endpoint else place.address}", f"--secure-port={place.api_port}",
        f"--advertise-address={place.address}",
        f"--endpoint-reconciler-type={'lease' if place.with_endpoint else 'none'}",
        f"--tls-cert-file={certificates.server}", f"--tls-private-key-file={certificates.server_key}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={certificates.service_account_key}",
        f"--service-account-signing-key-file={certificates.service_account_key}",
        "--authorization-mode=RBAC", f"--token-auth-file={folder / 'tokens.csv'}", "--allow-privileged=true",
        f"--requestheader-client-ca-file={certificates.ca}", "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={certificates.proxy_client}",
        f"--proxy-client-key-file={certificates.proxy_client_key}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--audit-policy-file={folder / 'audit-policy.json'}", f"--audit-log-path={audit_log}",
    ])  # fmt: skip
    url = f"https://{place.address}:{place.api_port}"
    kubeconfig = write_kubeconfig(folder / "internal.kubeconfig", url, certificates.ca, token)
    return Endpoint(url, token, certificates, kubeconfig, audit_log)


def start_controller_manager(
    processes: Processes, programs: Mapping[str, Path], place: Place, endpoint: Endpoint
) -> None:
    processes.start("kube-controller-manager", [
        *place.prefix, programs["kube-controller-manager"], f"--kubeconfig={endpoint.kubeconfig}",
        f"--service-account-private-key-file={endpoint.certificates.service_account_key}",
        f"--root-ca-file={endpoint.certificates.ca}", "--use-service-account-credentials=false",
        "--leader-elect=false", "--secure-port=0",
        # Tests make a thousand objects at once, and wait for garbage collection.
        "--kube-api-qps=500", "--kube-api-burst=1000", "--concurrent-gc-syncs=50",
        # Seconds where a large cluster takes minutes.
        "--horizontal-pod-autoscaler-sync-period=5s", "--horizontal-pod-autoscaler-downscale-stabilization=10s",
        "--horizontal-pod-autoscaler-cpu-initialization-period=10s",
        "--horizontal-pod-autoscaler-initial-readiness-delay=5s",
        "--node-monitor-grace-period=20s",
    ])  # fmt: skip


def wait_until_ready(processes: Processes, url: str, endpoint: Endpoint) -> None:
    """Wait for the API server at this address. Raises: StartFailed."""
    processes.wait_for("API server ready", lambda: answers(url, endpoint, "/readyz"), blame="kube-apiserver")


def wait_until_controllers_work(processes: Processes, url: str, endpoint: Endpoint) -> None:
    """The first thing that controllers make: without it no pod is admitted to the namespace. Raises: StartFailed."""
    path = "/api/v1/namespaces/default/serviceaccounts/default"
    processes.wait_for("controllers at work", lambda: answers(url, endpoint, path), blame="kube-controller-manager")


def answers(url: str, endpoint: Endpoint, path: str) -> bool:
    """Whether the administrator gets a 200 there."""
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {endpoint.token}"})
    context = ssl.create_default_context(cafile=os.fspath(endpoint.certificates.ca))
    try:
        with urllib.request.urlopen(request, timeout=5.0, context=context):
            return True
    except (urllib.error.URLError, OSError):
        return False

"""What surrounds an operator in tests of the control-plane tier: its process, pods that only say that they are ready,
and gateways that answer at the internal port as the real ones would. API server and controllers are real.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from baton_operator import crd, kinds
from baton_operator.objects import COMPONENT_LABEL, REVISION_LABEL, SERVICE_LABEL
from bench.ports import free_port
from tests.cluster.api_proxy import ApiProxy
from tests.cluster.kube import PATIENCE_S, Cluster, write_kubeconfig
from tests.cluster.processes import end_with_parent
from tests.metrics_text import Metrics

REPOSITORY = Path(__file__).resolve().parents[2]
_ACCOUNT = "baton-operator"


class Admin:
    """The API server as its administrator sees it: plain JSON over connections that are kept."""

    def __init__(self, cluster: Cluster) -> None:
        self._address = urllib.parse.urlsplit(cluster.url)
        self._token = cluster.token
        self._tls = ssl.create_default_context(cafile=str(cluster.ca_file))
        self._free: queue.SimpleQueue[http.client.HTTPSConnection] = queue.SimpleQueue()

    def close(self) -> None:
        while not self._free.empty():
            self._free.get().close()

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        content: str = "application/json",
        *,
        missing_ok: bool = False,
    ) -> Any:
        """Raises: RuntimeError with the API server's words. None for a 404 that is allowed."""
        status, answer = self.answer(method, path, body, content)
        if status == 404 and missing_ok:
            return None
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {answer.decode()[:800]}")
        return json.loads(answer)

    def answer(
        self, method: str, path: str, body: object = None, content: str = "application/json"
    ) -> tuple[int, bytes]:
        """Status and body. A connection that was closed meanwhile is replaced."""
        try:
            connection = self._free.get_nowait()
        except queue.Empty:
            connection = self._connect()
        try:
            return self._ask(connection, method, path, body, content)
        except (http.client.HTTPException, OSError):
            connection.close()
            connection = self._connect()
            return self._ask(connection, method, path, body, content)
        finally:
            self._free.put(connection)

    def _connect(self) -> http.client.HTTPSConnection:
        assert self._address.hostname is not None
        return http.client.HTTPSConnection(self._address.hostname, self._address.port, context=self._tls, timeout=120.0)

    def _ask(
        self, connection: http.client.HTTPSConnection, method: str, path: str, body: object, content: str
    ) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": content}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()

    def apply(self, path: str, manifest: Mapping[str, Any], manager: str = "test") -> Any:
        query = f"?fieldManager={manager}&force=true"
        return self.call("PATCH", path + query, manifest, "application/apply-patch+yaml")

    def merge(self, path: str, patch: Mapping[str, Any]) -> Any:
        return self.call("PATCH", path, patch, "application/merge-patch+json")


def install(admin: Admin) -> None:
    """CRDs, and wait until they are served."""
    for definition in (crd.llmservice_crd(), crd.llmpool_crd()):
        name = definition["metadata"]["name"]
        admin.apply(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}", definition)
    until("CRDs served", lambda: _serves_crds(admin))


def _serves_crds(admin: Admin) -> bool:
    found = admin.call("GET", "/apis/serving.baton.dev/v1alpha1", missing_ok=True)
    names = {resource["name"] for resource in (found or {"resources": []})["resources"]}
    return {"llmservices", "llmservices/status", "llmpools/scale"} <= names


def until(what: str, is_true: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Poll until it is truthy. Raises: TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not (found := is_true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {timeout_s:.0f} s")
        time.sleep(0.05)
    return found


@dataclass
class Namespace:
    """One namespace with the rights of an operator in it, and what tests ask of it."""

    admin: Admin
    name: str

    def make(self) -> str:
        """Returns the token of the operator's account: exactly the rights of `kinds.rules`."""
        admin, rbac = self.admin, "/apis/rbac.authorization.k8s.io/v1"
        admin.apply(
            f"/api/v1/namespaces/{self.name}",
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name}},
        )
        until("default account", lambda: self.get("v1", "serviceaccounts", "default") is not None)
        metadata = {"name": _ACCOUNT, "namespace": self.name}
        admin.apply(
            f"/api/v1/namespaces/{self.name}/serviceaccounts/{_ACCOUNT}",
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        )
        group = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": metadata}
        role = {"kind": "Role", "rules": kinds.rules()}
        admin.apply(f"{rbac}/namespaces/{self.name}/roles/{_ACCOUNT}", group | role)
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": _ACCOUNT}
        subject = {"kind": "ServiceAccount", "name": _ACCOUNT, "namespace": self.name}
        binding = {"kind": "RoleBinding", "roleRef": reference, "subjects": [subject]}
        admin.apply(f"{rbac}/namespaces/{self.name}/rolebindings/{_ACCOUNT}", group | binding)
        asked = admin.call(
            "POST", f"/api/v1/namespaces/{self.name}/serviceaccounts/{_ACCOUNT}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}},
        )  # fmt: skip
        return asked["status"]["token"]

    def remove(self) -> None:
        self.admin.call("DELETE", f"/api/v1/namespaces/{self.name}")

    def path(self, api_version: str, plural: str, name: str = "") -> str:
        prefix = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        return f"{prefix}/namespaces/{self.name}/{plural}" + (f"/{name}" if name else "")

    def get(self, api_version: str, plural: str, name: str) -> Any:
        return self.admin.call("GET", self.path(api_version, plural, name), missing_ok=True)

    def list(self, api_version: str, plural: str) -> list[Any]:
        return self.admin.call("GET", self.path(api_version, plural))["items"]

    def service(self, name: str = "chat") -> Any:
        return self.get("serving.baton.dev/v1alpha1", "llmservices", name)

    def pool(self, name: str) -> Any:
        return self.get("serving.baton.dev/v1alpha1", "llmpools", name)

    def deployments(self) -> dict[str, Any]:
        return {found["metadata"]["name"]: found for found in self.list("apps/v1", "deployments")}

    def apply_service(self, spec: Mapping[str, Any], name: str = "chat") -> Any:
        manifest = {
            "apiVersion": "serving.baton.dev/v1alpha1", "kind": "LLMService",
            "metadata": {"name": name, "namespace": self.name}, "spec": spec,
        }  # fmt: skip
        return self.admin.apply(self.path("serving.baton.dev/v1alpha1", "llmservices", name), manifest)

    def delete_service(self, name: str = "chat") -> None:
        self.admin.call("DELETE", self.path("serving.baton.dev/v1alpha1", "llmservices", name))

    def condition(self, kind: str, name: str = "chat") -> dict[str, Any]:
        conditions = ((self.service(name) or {}).get("status") or {}).get("conditions") or []
        return next((found for found in conditions if found["type"] == kind), {})

    def is_ready(self, name: str = "chat") -> bool:
        """Of the generation that is there now."""
        service = self.service(name)
        ready = self.condition("Ready", name)
        return ready.get("status") == "True" and ready.get("observedGeneration") == service["metadata"]["generation"]


class FakeKubelet:
    """Every pod of a namespace becomes ready at once, but those of revisions in `broken`."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.broken: set[str] = set()
        self.breaks_new = False
        """Pods of revisions that have none yet stay unready."""
        self._known: set[str] = set()

    def __enter__(self) -> FakeKubelet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped.wait(0.1):
            try:
                for pod in self._namespace.list("v1", "pods"):
                    self._make_ready(pod)
            except (RuntimeError, OSError, http.client.HTTPException):
                continue  # the namespace or the pod went away

    def _make_ready(self, pod: Any) -> None:
        revision = pod["metadata"].get("labels", {}).get(REVISION_LABEL, "")
        if revision and revision not in self._known and self.breaks_new:
            self.broken.add(revision)
        self._known.add(revision)
        conditions = {found["type"]: found["status"] for found in pod["status"].get("conditions", ())}
        if conditions.get("Ready") == "True" or revision in self.broken or "deletionTimestamp" in pod["metadata"]:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ready = [
            {"type": kind, "status": "True", "lastTransitionTime": now}
            for kind in ("Initialized", "ContainersReady", "Ready", "PodScheduled")
        ]
        container = pod["spec"]["containers"][0]
        state = {
            "name": container["name"], "image": container["image"], "imageID": "", "ready": True, "restartCount": 0,
            "started": True, "state": {"running": {"startedAt": now}},
        }  # fmt: skip
        status = {"phase": "Running", "conditions": ready, "containerStatuses": [state], "startTime": now}
        path = self._namespace.path("v1", "pods", pod["metadata"]["name"])
        self._namespace.admin.merge(f"{path}/status", {"status": status})


_MAX_GATEWAYS = 3


@dataclass
class FakeGateway:
    """The gateways of one service at the internal port: real HTTP servers that the service's EndpointSlices point to.

    A probe of a revision goes through if that revision has a ready P and D. They serve what the routing ConfigMap says.
    Always as many as a service of these tests may ask for: each ready one must say what it serves.
    """

    namespace: Namespace
    service: str = "chat"
    refuses: set[str] = field(default_factory=set)
    probes: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> FakeGateway:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(*gateway.status(self.headers.get("baton-secret", "")))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*gateway.probe(self.headers.get("baton-secret", ""), request))

            def _answer(self, status: int, answer: object) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._servers = [ThreadingHTTPServer((own_address(), 0), Handler) for _ in range(_MAX_GATEWAYS)]
        for number, server in enumerate(self._servers):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self._write_slice(number, server.server_address[1])
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def status(self, secret: str) -> tuple[int, object]:
        if not self._knows(secret):
            return 401, {"message": "wrong secret"}
        return 200, {"servingRevision": self.serving()}

    def probe(self, secret: str, request: dict[str, Any]) -> tuple[int, object]:
        if not self._knows(secret):
            return 401, {"message": "wrong secret"}
        self.probes.append(request)
        revision = request["revision"]
        ready = {role: self._is_ready(f"{self.service}-{role}-{revision}") for role in ("prefill", "decode")}
        if not all(ready.values()) or revision in self.refuses:
            return 200, {"ok": False, "revision": revision, "error": "no routable pair"}
        return 200, {
            "ok": True, "revision": revision, "prefillWorker": "p", "decodeWorker": "d", "transport": "grpc",
            "bytes": 24576, "handoverMs": 3.1, "ttftMs": 20.0, "tokens": 4,
        }  # fmt: skip

    def serving(self) -> str | None:
        """What the routing file would say."""
        found = self.namespace.get("v1", "configmaps", f"{self.service}-routing")
        text = ((found or {}).get("data") or {}).get("routing.json")
        return json.loads(text)["servingRevision"] if text else None

    def _is_ready(self, deployment: str) -> bool:
        found = self.namespace.get("apps/v1", "deployments", deployment)
        return bool(found and found["status"].get("readyReplicas"))

    def _knows(self, secret: str) -> bool:
        found = self.namespace.get("v1", "secrets", f"{self.service}-internal")
        return bool(found) and base64.b64decode(found["data"]["secret"]).decode() == secret

    def _write_slice(self, number: int, port: int) -> None:
        name = f"{self.service}-fake-{number}"
        labels = {"kubernetes.io/service-name": f"{self.service}-gateway", SERVICE_LABEL: self.service}
        labels |= {"endpointslice.kubernetes.io/managed-by": "tests", COMPONENT_LABEL: "gateway"}
        manifest = {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": self.namespace.name, "labels": labels},
            "endpoints": [{"addresses": [own_address()], "conditions": {"ready": True}}],
            "ports": [{"name": "internal", "port": port, "protocol": "TCP"}],
        }  # fmt: skip
        self.namespace.admin.apply(self.namespace.path("discovery.k8s.io/v1", "endpointslices", name), manifest)


def own_address() -> str:
    """An address of this machine that is not loopback: EndpointSlices take no other. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


class Operator:
    """`python -m baton_operator run` as its own process, against any URL (the API server's or a proxy's)."""

    def __init__(self, url: str, ca_file: Path, token: str, folder: Path, *arguments: str) -> None:
        self._kubeconfig = write_kubeconfig(folder / f"operator-{os.urandom(3).hex()}.kubeconfig", url, ca_file, token)
        self.folder = folder
        self._log = folder / f"{self._kubeconfig.stem}.log"
        self._arguments = arguments
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.code = REPOSITORY / "operator"
        """The folder of the package that the next start runs: that of another version, say."""

    def start(self) -> None:
        self._port = free_port()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("BATON_", "KUBERNETES_"))
        }
        environment |= {"KUBECONFIG": str(self._kubeconfig), "PYTHONPATH": str(self.code)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "baton_operator", "run", "--http", f"127.0.0.1:{self._port}", *self._arguments],
                env=environment, stdout=log, stderr=subprocess.STDOUT, cwd="/", preexec_fn=end_with_parent,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_synced(self) -> bool:
        try:
            return bool(self.http("/readyz"))
        except OSError:
            return False

    def http(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=30.0) as response:
            return response.read().decode()

    def kill(self) -> None:
        """SIGKILL, as an eviction that does not wait; returns when it is dead."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(120.0)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


@contextmanager
def running_operator(operator: Operator) -> Iterator[Operator]:
    operator.start()
    try:
        yield operator
    finally:
        operator.kill()


@dataclass
class World:
    """One namespace, one service `chat`, its fake pods and gateway, and the operator behind a recording proxy."""

    cluster: Cluster
    namespace: Namespace
    proxy: ApiProxy
    kubelet: FakeKubelet
    gateway: FakeGateway
    operator: Operator

    def apply(self, spec: dict[str, Any]) -> None:
        self.namespace.apply_service(spec)

    def until_ready(self) -> None:
        try:
            until("chat ready", self.namespace.is_ready)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.namespace.service()}\n{self.operator.log[-4000:]}") from error

    def num_passes(self) -> float:
        """How often the operator has looked at its service since it was started."""
        return Metrics.parse(self.operator.http("/metrics")).value("baton_operator_reconciles_total")

    def until_at_rest(self) -> None:
        """Ready, with no revision on its way in or out."""
        try:
            until("at rest", self._is_at_rest)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.namespace.service()}\n{self.operator.log[-4000:]}") from error

    def _is_at_rest(self) -> bool:
        service, progressing = self.namespace.service(), self.namespace.condition("Progressing")
        is_current = service.get("status", {}).get("observedGeneration") == service["metadata"]["generation"]
        return self.namespace.is_ready() and progressing.get("status") == "False" and is_current

    def until_quiet(self, quiet_s: float = 2.0) -> None:
        """Until nothing was written for a while."""
        seen = -1
        while seen != self.proxy.recording.num_mutating:
            seen = self.proxy.recording.num_mutating
            time.sleep(quiet_s)

    def kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl(*arguments, "-n", self.namespace.name)


@contextmanager
def new_world(cluster: Cluster, admin: Admin, folder: Path, *arguments: str) -> Iterator[World]:
    """A namespace of its own with a running operator; gone afterwards."""
    assert cluster.ca_file is not None
    namespace = Namespace(admin, f"op-{os.urandom(3).hex()}")
    token = namespace.make()
    with (
        ApiProxy(cluster.url, cluster.ca_file) as proxy,
        FakeKubelet(namespace) as kubelet,
        FakeGateway(namespace) as gateway,
    ):
        operator = Operator(proxy.url, cluster.ca_file, token, folder, "--namespace", namespace.name, *arguments)
        with running_operator(operator):
            yield World(cluster, namespace, proxy, kubelet, gateway, operator)
    namespace.remove()


CHILDREN = (
    ("apps/v1", "deployments"), ("v1", "services"), ("v1", "configmaps"), ("v1", "serviceaccounts"), ("v1", "secrets"),
    ("networking.k8s.io/v1", "networkpolicies"), ("policy/v1", "poddisruptionbudgets"),
    ("networking.k8s.io/v1", "ingresses"), ("serving.baton.dev/v1alpha1", "llmpools"),
    ("serving.baton.dev/v1alpha1", "llmservices"),
)  # fmt: skip
_CHANCE = {
    "uid", "resourceVersion", "creationTimestamp", "generation", "observedGeneration", "managedFields", "time",
    "lastTransitionTime", "lastUpdateTime", "clusterIP", "clusterIPs", "nodePort", "deployment.kubernetes.io/revision",
    "serving.baton.dev/applied",
}  # fmt: skip


def end_state(namespace: Namespace) -> dict[str, Any]:
    """Every object that a service is made of, without what chance decides."""
    found: dict[str, Any] = {}
    for api_version, plural in CHILDREN:
        for item in namespace.list(api_version, plural):
            labels = item["metadata"].get("labels") or {}
            if SERVICE_LABEL in labels or plural == "llmservices":
                found[f"{plural}/{item['metadata']['name']}"] = _without_chance(item, plural)
    text = json.dumps(found, sort_keys=True).replace(namespace.name, "NAMESPACE")
    for deployment in found:
        if deployment.startswith("deployments/") and (revision := _revision(found[deployment])):
            text = text.replace(revision, "REVISION" if revision == _serving(found) else "OTHER")
    return json.loads(text)


def _revision(deployment: Any) -> str:
    return deployment["metadata"]["labels"].get(REVISION_LABEL, "")


def _serving(found: Mapping[str, Any]) -> str:
    service = next(value for key, value in found.items() if key.startswith("llmservices/"))
    return (service.get("status") or {}).get("servingRevision", "")


def _without_chance(value: Any, plural: str) -> Any:
    if isinstance(value, dict):
        dropped = _CHANCE | ({"data"} if plural in ("secrets", "configmaps") else set())
        kept = {key: _without_chance(inner, plural) for key, inner in value.items() if key not in dropped}
        if plural == "secrets" and "data" in value:
            kept["data"] = {key: len(text) for key, text in value["data"].items()}
        if plural == "configmaps" and "data" in value:
            kept["data"] = {"routing.json": value["data"].get("routing.json", "")}
        if plural == "deployments":
            kept.pop("conditions", None)
        return kept
    return [_without_chance(inner, plural) for inner in value] if isinstance(value, list) else value

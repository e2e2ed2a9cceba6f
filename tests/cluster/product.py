"""The product on a node as a user installs it: our images, the chart, one LLMService, and streams to hold it to.

The machine that runs the tests has no registry and the node no way out, so images are built here and imported, and the
model is on a PersistentVolume that somebody filled before: what `spec.model.cacheClaimName` is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.service import running_document
from modelfiles.cache import default_cache_dir
from modelfiles.store import pull
from tests.cluster.build import cache_folder, find, find_base_image, find_tier
from tests.cluster.errors import ClusterError, Unavailable
from tests.cluster.kube import PATIENCE_S, NodeCluster
from tests.e2e.chaos import Workload
from tests.e2e.streams import Stream, open_stream
from tests.metrics_text import Metrics

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "baton"
TAG = "node-test"
IMAGES_OF_CHART = ("operator", "gateway", "worker", "redis")
RELEASE = "ops"
SERVICE_LABEL = "serving.baton.dev/service"
_BUILD_TIMEOUT_S = 1500.0  # the first time; with everything cached it takes one minute
_USER = 65532


def find_tools() -> Path:
    """helm; raises Unavailable where images cannot be built here."""
    find_tier("images")
    find_base_image()
    return find("helm")["helm"]


def build_images(archive: Path) -> None:
    """All images of the working tree. Layers are cached beside the test cluster's programs."""
    command = [sys.executable, ROOT / "images" / "build.py", "--builder=buildah", f"--base-tar={find_base_image()}"]
    command += [f"--storage={cache_folder() / 'buildah'}", f"--tag={TAG}", f"--into={archive}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S)
    if done.returncode != 0:
        raise ClusterError(f"images/build.py: {done.stderr[-4000:]}")


def fill_model_cache(folder: Path) -> None:
    """What `baton pull smollm2` leaves in a cache folder, readable and writable by our images' user."""
    models = folder / "models"
    model = pull("smollm2").parent
    shutil.copytree(model, models / model.relative_to(default_cache_dir()))
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _USER, _USER)


def local_answers(document: Mapping[str, Any], workloads: Sequence[Workload]) -> dict[str, Stream]:
    """What local mode says with the same LLMService, by kind of request."""

    async def ask_all(host: str, port: int) -> dict[str, Stream]:
        return {each.kind: await open_stream(host, port, each.path, each.body, kind=each.kind) for each in workloads}

    with running_document(document) as service:
        said = asyncio.run(ask_all(service.host, service.port))
    for workload in workloads:
        assert not said[workload.kind].complaint(workload.num_choices), said[workload.kind]
    return said


@dataclass
class Product:
    """The operator's release in one namespace and the LLMService there."""

    cluster: NodeCluster
    helm_program: Path
    namespace: str
    document: dict[str, Any]
    workloads: Sequence[Workload]
    expected: Mapping[str, Stream]
    times_s: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def name(self) -> str:
        return self.document["metadata"]["name"]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.times_s[what] = round(time.monotonic() - began, 1)

    def helm(self, *arguments: str | Path, timeout_s: float = 400.0) -> str:
        command = [self.helm_program, *arguments, "--namespace", self.namespace]
        done = subprocess.run(
            command, env=self.cluster.environment(), capture_output=True, text=True, check=False, timeout=timeout_s
        )
        if done.returncode != 0:
            raise ClusterError(f"helm {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
        return done.stdout

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = PATIENCE_S) -> str:
        return self.cluster.kubectl(*arguments, "-n", self.namespace, stdin=stdin, timeout_s=timeout_s)

    def get(self, *arguments: str) -> Any:
        return self.cluster.get(*arguments, "-n", self.namespace)

    def apply(self, document: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(dict(document)))

    def patch(self, spec: Mapping[str, Any]) -> None:
        self.kubectl("patch", "llm", self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def wait_until(self, what: str, is_true: Callable[[], bool], timeout_s: float = 300.0) -> None:
        """With what pods and operator said, where it does not come true."""
        try:
            self.cluster.wait_until(what, is_true, timeout_s)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.story()}") from None

    def story(self) -> str:
        """What somebody would look at first."""
        asked = (["get", "llm,llmpool,deployments,pods"], ["logs", f"deployment/{RELEASE}-baton", "--tail=20"])
        return "\n".join(self.kubectl(*arguments) for arguments in asked)

    # ------------------------------------------------------------ what there is

    def service(self) -> dict[str, Any]:
        return self.get("llm", self.name)

    def condition(self, kind: str) -> dict[str, Any]:
        found = [each for each in self.service()["status"]["conditions"] if each["type"] == kind]
        return found[0]

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Those that are not on their way out."""
        label = f"{SERVICE_LABEL}={self.name},app.kubernetes.io/component={component}"
        found = self.get("pods", "-l", label)["items"]
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def num_ready(self, component: str) -> int:
        return sum(
            all(status["ready"] for status in pod["status"].get("containerStatuses") or [{"ready": False}])
            for pod in self.pods(component)
        )

    def metrics(self, pod: Mapping[str, Any], port: int = 7001) -> Metrics:
        where = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}:{port}/proxy/metrics"
        return Metrics.parse(self.cluster.kubectl("get", "--raw", where))

    def num_passes(self) -> float:
        """How often the operator has looked at the service and done what was to do."""
        label = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=operator"
        operators = self.get("pods", "-l", label)["items"]
        return sum(self.metrics(pod, port=8080).value("baton_operator_reconciles_total") for pod in operators)

    def log(self, pod: Mapping[str, Any], container: str) -> list[dict[str, Any]]:
        text = self.kubectl("logs", pod["metadata"]["name"], "-c", container)
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def requests(self) -> list[dict[str, Any]]:
        """What the gateways logged at the end of each request of users."""
        lines = [line for pod in self.pods("gateway") for line in self.log(pod, "gateway")]
        ended = [line for line in lines if line.get("message") == "request ended"]
        return [line for line in ended if not line["request_id"].startswith("probe-")]

    def revision_of(self, worker_id: str) -> str:
        """A worker is called as its pod: <service>-<role>-<revision>-<replica set>-<pod>."""
        return worker_id.removeprefix(f"{self.name}-").split("-")[1]

    # ------------------------------------------------------------ what befalls it

    def kill(self, component: str) -> str:
        """SIGKILL the process of the first pod, as the kernel or a crash would; returns the pod's name."""
        pod = self.pods(component)[0]
        killed = [process for process in _processes_of(pod["metadata"]["uid"]) if f"{component}_service" in process[1]]
        assert killed, f"no process of {pod['metadata']['name']}"
        for pid, _ in killed:
            os.kill(pid, signal.SIGKILL)
        return pod["metadata"]["name"]

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        """Streams through the gateway's Service until the block ends; then none may be lost or differ."""
        with self.cluster.forward_service(self.namespace, self.name, 80) as address:
            host, _, port = address.partition(":")
            traffic = Traffic(host, int(port), self.workloads, self.expected)
            with traffic:
                traffic.wait_for(2)
                yield traffic
                traffic.wait_for(2)
            assert not traffic.wrong, traffic.wrong


class Traffic:
    """Streams on two lanes, one after another on each, held to what local mode said."""

    _LANES = 2

    def __init__(self, host: str, port: int, workloads: Sequence[Workload], expected: Mapping[str, Stream]) -> None:
        self._where = host, port
        self._workloads, self._expected = workloads, expected
        self._is_over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.num_streams = 0
        self.slowest_gap_s = 0.0
        self.wrong: list[str] = []

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    def wait_for(self, num_streams: int, timeout_s: float = 300.0) -> None:
        """Until so many more streams have ended."""
        enough, deadline = self.num_streams + num_streams, time.monotonic() + timeout_s
        while self.num_streams < enough:
            assert time.monotonic() < deadline, f"{self.num_streams} of {enough} streams; wrong: {self.wrong}"
            time.sleep(0.05)

    async def _run(self) -> None:
        await asyncio.gather(*(self._lane(number) for number in range(self._LANES)))

    async def _lane(self, number: int) -> None:
        while not self._is_over:
            workload = self._workloads[number % len(self._workloads)]
            number += self._LANES - 1 if number % 2 else self._LANES + 1
            body = workload.body | {"cache_salt": f"{os.getpid()}-{number}-{self.num_streams}"}
            stream = await open_stream(*self._where, workload.path, body, kind=workload.kind)
            self._judge(workload, stream)
            self.num_streams += 1

    def _judge(self, workload: Workload, stream: Stream) -> None:
        self.slowest_gap_s = max(self.slowest_gap_s, stream.slowest_gap_s)
        if complaint := stream.complaint(workload.num_choices):
            self.wrong.append(f"lost, {workload.kind}, {stream.request_id}: {complaint}")
        elif stream.choices != self._expected[workload.kind].choices:
            self.wrong.append(f"differs, {workload.kind}, {stream.request_id}: {stream.choices}")


def memory_peak(pod: Mapping[str, Any]) -> int:
    """The most bytes that the pod's cgroup ever held, page cache included."""
    for pattern, name in (("*/*/kubepods/**", "memory.max_usage_in_bytes"), ("*/kubepods/**", "memory.peak")):
        for folder in Path("/sys/fs/cgroup").glob(f"{pattern}/pod{pod['metadata']['uid']}"):
            if (folder / name).exists():
                return int((folder / name).read_text())
    raise Unavailable("this machine's cgroups do not say how much memory a pod held")


def _processes_of(uid: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if f"pod{uid}" in Path(f"/proc/{process.pid}/cgroup").read_text():
                found.append((process.pid, " ".join(process.cmdline())))
    return found

"""The node tier: real pods, Services, DNS and limits, and nothing left behind however it ends."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from pathlib import Path

import pytest

from tests.cluster import build, runs
from tests.cluster.build import find
from tests.cluster.errors import Unavailable
from tests.cluster.holder import hold_a_cluster, supervisor_of, until_gone
from tests.cluster.images import write_image
from tests.cluster.kube import NodeCluster
from tests.cluster.node import SANDBOX_IMAGE

NAMESPACE = "node-tier"
READY_TIMEOUT_S = 240.0
# What a restricted namespace asks of each container.
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _overcommit() -> str:
    """What a kubelet sets for the whole machine, unless it is kept from it."""
    path = Path("/proc/sys/vm/overcommit_memory")
    return path.read_text() if path.exists() else ""


OVERCOMMIT_BEFORE = _overcommit()

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def web(node_cluster: NodeCluster) -> NodeCluster:
    """A Deployment of two restricted web servers behind a Service, in an own namespace."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    node_cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _named("settings"), "data": {"colour": "red"}},
        _deployment(replicas=2),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _named("web"),
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
        },
    )
    _wait_for_ready(node_cluster, 2)
    return node_cluster


def test_a_service_is_reached_from_this_machine_and_spreads_its_calls(web: NodeCluster) -> None:
    """A pod is Ready a moment before the node's rules lead to it."""
    answers: set[bytes] = set()

    def has_both(address: str) -> bool:
        with contextlib.suppress(OSError):
            answers.add(urllib.request.urlopen(f"http://{address}", timeout=10).read())
        return len(answers) == 2

    with web.forward_service(NAMESPACE, "web", 80) as address:
        web.wait_until("both pods", lambda: has_both(address))


def test_a_pod_reaches_a_service_by_name(web: NodeCluster) -> None:
    name = f"http://web.{NAMESPACE}.svc.cluster.local"
    assert web.kubectl("exec", "-n", NAMESPACE, "deployment/web", "--", "/pod", "get", name).startswith("web-")


def test_a_pod_sees_its_own_limits_in_its_cgroup(web: NodeCluster) -> None:
    pod = web.get("pods", "-n", NAMESPACE)["items"][0]["metadata"]["uid"]
    limits = list(Path("/sys/fs/cgroup").glob(f"*/*/kubepods/**/pod{pod}/memory.limit_in_bytes"))
    limits += list(Path("/sys/fs/cgroup").glob(f"*/kubepods/**/pod{pod}/memory.max"))
    assert [int(path.read_text()) for path in limits] == [64 << 20]


def test_a_mounted_config_map_changes_within_seconds(web: NodeCluster) -> None:
    web.kubectl("patch", "configmap", "settings", "-n", NAMESPACE, "-p", json.dumps({"data": {"colour": "blue"}}))
    uid = web.get("pods", "-n", NAMESPACE)["items"][0]["metadata"]["uid"]
    assert web.audit_log is not None
    mounted = web.audit_log.parent / "kubelet" / "pods" / uid / "volumes/kubernetes.io~configmap/settings/colour"
    web.wait_until("the new value", lambda: web.run_inside("cat", mounted) == "blue", timeout_s=40.0)


def test_metrics_of_pods_are_measured(web: NodeCluster) -> None:
    path = f"/apis/metrics.k8s.io/v1beta1/namespaces/{NAMESPACE}/pods"
    web.wait_until("metrics", lambda: len(json.loads(web.kubectl("get", "--raw", path))["items"]) == 2)


def test_an_autoscaler_reads_them(web: NodeCluster) -> None:
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 90}},
    }
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}
    spec = {"minReplicas": 2, "maxReplicas": 2, "scaleTargetRef": target, "metrics": [metric]}
    web.apply(
        {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": _named("web"), "spec": spec}
    )

    def is_active() -> bool:
        status = web.get("hpa", "web", "-n", NAMESPACE).get("status", {})
        return any(c["type"] == "ScalingActive" and c["status"] == "True" for c in status.get("conditions", []))

    web.wait_until("ScalingActive", is_active)


def test_a_pod_reaches_the_api_server_and_trusts_it(web: NodeCluster) -> None:
    """By name and with the certificate that controllers put into every pod."""
    name = "https://kubernetes.default.svc.cluster.local/version"
    said = web.kubectl("exec", "-n", NAMESPACE, "deployment/web", "--", "/pod", "get", name)
    assert json.loads(said)["gitVersion"] == build.kubernetes_version()


def test_an_imported_image_runs(web: NodeCluster, tmp_path: Path) -> None:
    web.import_image(write_image(tmp_path / "image.tar", "baton.test/imported:7", find("pod")["pod"], ["/pod"]))
    spec = {"containers": [{"name": "main", "image": "baton.test/imported:7", "securityContext": RESTRICTED}]}
    web.apply({"apiVersion": "v1", "kind": "Pod", "metadata": _named("imported"), "spec": spec})
    web.kubectl("wait", "pod/imported", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=240s")


def test_a_deleted_pod_is_replaced(web: NodeCluster) -> None:
    first = {pod["metadata"]["name"] for pod in web.get("pods", "-n", NAMESPACE, "-l", "app=web")["items"]}
    web.kubectl("delete", "pod", sorted(first)[0], "-n", NAMESPACE)
    _wait_for_ready(web, 2)
    assert {pod["metadata"]["name"] for pod in web.get("pods", "-n", NAMESPACE, "-l", "app=web")["items"]} != first


def test_nothing_of_a_node_is_left_when_the_test_run_is_killed(node_cluster: NodeCluster) -> None:
    """A second node beside the shared one, with its own namespaces; pods, mounts and cgroups end with it."""
    holder, run = hold_a_cluster("node")
    holder.kill()
    holder.wait()
    until_gone(run)
    assert run not in Path("/proc/self/mounts").read_text()
    assert _overcommit() == OVERCOMMIT_BEFORE
    assert node_cluster.kubectl("get", "--raw", "/readyz") == "ok"


def test_next_start_removes_what_a_killed_supervisor_of_a_node_left(node_cluster: NodeCluster) -> None:
    """The kernel ends every process of the namespaces; cgroups and the folder are left for the next start."""
    holder, run = hold_a_cluster("node")
    supervisor = supervisor_of(run)
    supervisor.kill()
    holder.kill()
    holder.wait()
    supervisor.wait(60.0)
    runs.clean_leftovers()
    until_gone(run)
    assert run not in Path("/proc/self/mounts").read_text()
    assert node_cluster.kubectl("get", "--raw", "/readyz") == "ok"


def test_without_root_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="the node tier needs root"):
        build.find_tier("node")


def _named(name: str) -> dict[str, object]:
    return {"name": name, "namespace": NAMESPACE}


def _deployment(replicas: int) -> dict[str, object]:
    container = {
        "name": "web",
        "image": SANDBOX_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["serve", ":8080"],
        "env": [{"name": "SSL_CERT_FILE", "value": "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"}],
        "readinessProbe": {"httpGet": {"port": 8080}, "periodSeconds": 1},
        "resources": {"limits": {"cpu": "200m", "memory": "64Mi"}, "requests": {"cpu": "10m"}},
        "securityContext": RESTRICTED,
        "volumeMounts": [{"name": "settings", "mountPath": "/settings"}],
    }
    volumes = [{"name": "settings", "configMap": {"name": "settings"}}]
    pod = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container], "volumes": volumes}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _named("web"),
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": pod},
    }


def _wait_for_ready(cluster: NodeCluster, num_ready: int) -> None:
    def is_ready() -> bool:
        return cluster.get("deployment", "web", "-n", NAMESPACE)["status"].get("readyReplicas") == num_ready

    cluster.wait_until(f"{num_ready} ready pods", is_ready, timeout_s=READY_TIMEOUT_S)

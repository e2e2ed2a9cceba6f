"""The chart by the real helm: linted, refused where its values are wrong, and installed into a real API server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton_operator import kinds
from tests.cluster.build import find
from tests.cluster.errors import ClusterError, Unavailable
from tests.cluster.kube import Cluster

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "baton"
KNOWN_SERVICE = "--api-versions=serving.baton.dev/v1alpha1/LLMService"
ESTABLISHED = ("--for=condition=Established", "--timeout=200s")
NEVER = ("pods/exec", "pods/log", "nodes", "namespaces", "clusterroles")

pytestmark = pytest.mark.timeout(900)  # a helm takes half a second, and half a minute on a busy machine

EVERYTHING: dict[str, Any] = {
    "global": {"imageRegistry": "registry.example.com/team"},
    "fullnameOverride": "llm-operator",
    "watchNamespaces": ["chart-render", "chart-render-b"],
    "images": {
        "operator": {"digest": "sha256:" + "a" * 64},
        "worker": {"tag": "1.2.3"},
        "pullPolicy": "Always",
        "pullSecrets": ["registry-key"],
    },
    "operator": {
        "logLevel": "debug",
        "podLabels": {"team": "ml"},
        "podAnnotations": {"note": "x"},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "infra", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    },
    "serviceAccount": {"name": "someone", "annotations": {"cloud/identity": "x"}},
    "networkPolicy": {"metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]},
    "podMonitor": {"enabled": True, "labels": {"release": "p"}, "relabelings": [{"action": "labelmap", "regex": "x"}]},
    "prometheusRule": {"enabled": True, "labels": {"release": "p"}},
    "grafanaDashboards": {"enabled": True},
    "services": {"chat": {"pools": {"prefill": {"replicas": 2}, "decode": {"min": 1, "max": 4}}}},
}
MATRIX: dict[str, dict[str, Any]] = {
    "nothing stated": {},
    "everything stated": EVERYTHING,
    "the whole cluster": {"clusterWide": True},
    "no CRDs, rights and account of one's own": {
        "crds": {"enabled": False}, "rbac": {"create": False}, "serviceAccount": {"create": False, "name": "mine"},
    },
    "CRDs that go with the chart": {"crds": {"keep": False}},
    "no network policy": {"networkPolicy": {"enabled": False}},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"replicas": 2}, "replicas"),
    "an unknown value further in": ({"operator": {"replicas": 2}}, "replicas"),
    "a word for a number": ({"prometheusRule": {"queueRequests": "many"}}, "queueRequests"),
    "a number out of bounds": ({"prometheusRule": {"kvUsage": 95}}, "kvUsage"),
    "a word that is not known": ({"images": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    "a digest that is none": ({"images": {"worker": {"digest": "latest"}}}, "digest"),
    "a namespace that is none": ({"watchNamespaces": ["Team A"]}, "watchNamespaces"),
    "a service with an unknown field": ({"services": {"chat": {"pool": {}}}}, "chat"),
    "a service with a wrong value": ({"services": {"chat": {"pools": {"decode": {"replicas": -1}}}}}, "replicas"),
    "a service whose name is none": ({"services": {"Chat": {}}}, "Chat"),
    "a list of namespaces for the whole cluster": ({"clusterWide": True, "watchNamespaces": ["a"]}, "clusterWide"),
}


@dataclass(frozen=True)
class Helm:
    program: Path
    folder: Path

    def __call__(
        self, *arguments: str | Path, values: Mapping[str, Any] | None = None, cluster: Cluster | None = None
    ) -> subprocess.CompletedProcess[str]:
        stated = self.folder / "values.json"
        stated.write_text(json.dumps(values or {}))
        return subprocess.run(
            [self.program, *arguments, *(["--values", stated] if values else [])],
            env=cluster.environment() if cluster else None, capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip

    def must(self, *arguments: str | Path, **more: Any) -> str:
        done = self(*arguments, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def render(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        text = self.must("template", "ops", CHART, "--namespace=chart-render", KNOWN_SERVICE, values=values)
        return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    try:
        return Helm(find("helm")["helm"], tmp_path_factory.mktemp("helm"))
    except Unavailable as reason:
        pytest.skip(f"helm: {reason}")


# ---------------------------------------------------------------- without a cluster


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_the_chart_passes_a_strict_lint(helm: Helm, values: dict[str, Any]) -> None:
    with_known_kind = {key: value for key, value in values.items() if key != "services"}  # lint knows no kind of ours
    helm.must("lint", "--strict", CHART, values=with_known_kind)


@pytest.mark.parametrize(("values", "named"), REFUSED.values(), ids=REFUSED)
def test_wrong_values_are_refused_by_name(helm: Helm, values: dict[str, Any], named: str) -> None:
    done = helm("template", CHART, KNOWN_SERVICE, values=values)
    assert done.returncode != 0
    assert named in done.stderr


def test_a_service_is_refused_while_the_cluster_does_not_know_its_kind(helm: Helm) -> None:
    done = helm("template", CHART, values={"services": {"chat": {}}})
    assert done.returncode != 0
    assert "install the chart once without `services`" in done.stderr


def by_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


def pods(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The operator's, then that of `helm test`."""
    for document in by_kind(documents, "Deployment"):
        yield document["spec"]["template"]["spec"]
    for document in by_kind(documents, "Pod"):
        yield document["spec"]


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_the_role_is_what_the_operator_uses_and_nothing_else(helm: Helm, values: dict[str, Any]) -> None:
    documents = helm.render(values)
    roles = [*by_kind(documents, "Role"), *by_kind(documents, "ClusterRole")]
    for role in roles:
        assert role["rules"] == kinds.rules()
    assert len(roles) == (0 if values.get("rbac") else len(values.get("watchNamespaces", "1")))
    assert bool(by_kind(documents, "ClusterRole")) == bool(values.get("clusterWide"))


def test_a_digest_wins_and_the_registry_stands_before_every_image(helm: Helm) -> None:
    (operator, test) = pods(helm.render(EVERYTHING))
    assert operator["containers"][0]["image"] == test["containers"][0]["image"]
    assert operator["containers"][0]["image"] == f"registry.example.com/team/baton-operator@sha256:{'a' * 64}"
    arguments = operator["containers"][0]["args"]
    assert "--worker-image=registry.example.com/team/baton-worker:1.2.3" in arguments
    assert "--namespace=chart-render,chart-render-b" in arguments


def test_the_operators_flags_are_ones_that_it_knows(helm: Helm) -> None:
    from baton_operator.__main__ import _parser  # pyright: ignore[reportPrivateUsage]  # the flags as they are

    for values in MATRIX.values():
        (operator, _) = pods(helm.render(values))
        container = operator["containers"][0]
        assert container["command"] == ["python", "-m", "baton_operator", "run"]
        _parser().parse_args(["run", *container["args"]])


# ---------------------------------------------------------------- with a real API server


@pytest.fixture(scope="module")
def cluster(control_plane: Cluster) -> Iterator[Cluster]:
    """With the namespaces of the tests, which enforce the pod security level `restricted`."""
    spaces = ("chart-render", "chart-render-b", "chart-install")
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    for space in spaces:
        control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space, "labels": level}})
    yield control_plane
    for space in spaces:
        control_plane.kubectl("delete", "namespace", space, "--wait=false", "--ignore-not-found")


@pytest.fixture
def monitoring(cluster: Cluster) -> Iterator[None]:
    """Stand-ins of the Prometheus operator's kinds, without a schema."""
    made = [open_crd("monitoring.coreos.com", "v1", kind) for kind in ("PodMonitor", "PrometheusRule")]
    cluster.apply(*made)
    for crd in made:
        cluster.kubectl("wait", "crd", crd["metadata"]["name"], *ESTABLISHED)
    yield
    for crd in made:
        cluster.kubectl("delete", "crd", crd["metadata"]["name"])


def open_crd(group: str, version: str, kind: str) -> dict[str, Any]:
    plural = f"{kind.lower()}s"
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        },
    }


@pytest.mark.usefixtures("monitoring")
@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_the_api_server_takes_everything_that_is_rendered(helm: Helm, cluster: Cluster, values: dict[str, Any]) -> None:
    """Server-side apply, dry: schema of every field (unknown ones refused), CEL of the CRDs, admission."""
    documents = helm.render(values)
    definitions = by_kind(documents, "CustomResourceDefinition")
    if by_kind(documents, "LLMService"):
        cluster.apply(*definitions)
        for definition in definitions:
            cluster.kubectl("wait", "crd", definition["metadata"]["name"], *ESTABLISHED)
    for pod in by_kind(documents, "Pod"):  # admission looks their account up, and a dry run makes none
        account = {"name": pod["spec"]["serviceAccountName"], "namespace": pod["metadata"]["namespace"]}
        cluster.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
    strict = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
    said = cluster.kubectl("apply", *strict, "-f", "-", stdin=text)
    assert len(said.splitlines()) == len(documents)


def test_pods_are_of_the_level_restricted(helm: Helm, cluster: Cluster) -> None:
    """Asked of the API server itself: a warning of its pod security is no output line of an apply, so pods are made."""
    for values in (MATRIX["nothing stated"], MATRIX["everything stated"]):
        for i, pod in enumerate(pods(helm.render(values))):
            manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{i}", "namespace": "chart-render"}}
            bare = {key: value for key, value in pod.items() if key not in ("serviceAccountName", "priorityClassName")}
            cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(manifest | {"spec": bare}))
            del bare["containers"][0]["securityContext"]
            with pytest.raises(ClusterError, match="violates PodSecurity"):
                cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(manifest | {"spec": bare}))


@pytest.fixture(scope="module")
def previous_chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart as an earlier version may have been: its LLMService lacks a field that there is today."""
    chart = shutil.copytree(CHART, tmp_path_factory.mktemp("previous") / "baton")
    metadata = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(metadata.replace("\nversion: 0.1.0", "\nversion: 0.0.9"))
    template = chart / "templates" / "crds" / "llmservices.yaml"
    assert "networkPolicies:" in template.read_text()
    template.write_text(template.read_text().replace("networkPolicies:", "formerNetworkPolicies:"))
    return chart


def test_a_release_lives_through_install_upgrade_and_uninstall(
    helm: Helm, cluster: Cluster, previous_chart: Path
) -> None:
    space = ("--namespace", "chart-install")
    taken = ("--take-ownership", "--force-conflicts")  # other tests of this run may have made the CRDs
    said = helm.must("install", "ops", previous_chart, *space, *taken, cluster=cluster)
    assert "kubectl -n chart-install wait llm/chat --for=condition=Ready" in said
    assert fields_of_service(cluster).isdisjoint({"networkPolicies"})
    chat = {"apiVersion": "serving.baton.dev/v1alpha1", "kind": "LLMService", "metadata": {"name": "chat"}}
    cluster.kubectl("apply", "-n", "chart-install", "-f", "-", stdin=json.dumps(chat))
    before = cluster.get("llm", "chat", "-n", "chart-install")

    assert_rights(cluster, account="ops-baton", inside="chart-install", outside="chart-render")

    helm.must("upgrade", "ops", CHART, *space, cluster=cluster, values={"services": {"second": {}}})
    assert "networkPolicies" in fields_of_service(cluster), "the CRD is upgraded with the chart"
    after = cluster.get("llm", "chat", "-n", "chart-install")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert cluster.get("llm", "second", "-n", "chart-install")

    helm.must("uninstall", "ops", *space, cluster=cluster)
    kept = cluster.get("llm", "chat", "-n", "chart-install")
    assert kept["metadata"]["uid"] == before["metadata"]["uid"], "uninstall leaves the CRDs and what users made"
    with pytest.raises(ClusterError, match="not found"):
        cluster.get("deployment", "ops-baton", "-n", "chart-install")

    helm.must("install", "ops", CHART, *space, cluster=cluster)  # its own CRDs do not stand in the way
    helm.must("uninstall", "ops", *space, cluster=cluster)


def fields_of_service(cluster: Cluster) -> set[str]:
    (version,) = cluster.get("crd", "llmservices.serving.baton.dev")["spec"]["versions"]
    return set(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])


def assert_rights(cluster: Cluster, *, account: str, inside: str, outside: str) -> None:
    """The account may do what the table says, there and nowhere else, and none of what it must not."""
    who = f"--as=system:serviceaccount:{inside}:{account}"
    allowed = cluster.kubectl("auth", "can-i", "--list", "-n", inside, who)
    for rule in kinds.rules():
        (group,), (resource,) = rule["apiGroups"], rule["resources"]
        name = f"{resource.partition('/')[0]}.{group}" if group else resource.partition("/")[0]
        name += f"/{resource.partition('/')[2]}" if "/" in resource else ""
        (line,) = [line for line in allowed.splitlines() if line.split()[:1] == [name]]
        assert line.rpartition("[")[2].rstrip("]").split() == rule["verbs"], line
    assert "deployments.apps" not in cluster.kubectl("auth", "can-i", "--list", "-n", outside, who)
    assert not [line for line in allowed.splitlines() if line.split()[:1] in ([name] for name in NEVER)]

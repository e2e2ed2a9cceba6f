"""The operator as a process against a real API server and real controllers, with exactly the rights of its Role."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton_operator import kinds
from baton_operator.objects import FIELD_MANAGER
from tests.cluster.kube import Cluster
from tests.cluster.operator_world import (
    Admin,
    Namespace,
    Operator,
    World,
    install,
    new_world,
    running_operator,
    until,
)
from tests.metrics_text import Metrics, documented, types_of

pytestmark = pytest.mark.timeout(900)
SPEC: dict[str, Any] = {"pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 2}}}
OPEN: dict[str, Any] = {"pools": {"prefill": {"min": 1, "max": 3}, "decode": {"min": 1, "max": 4}}}


@pytest.fixture(scope="module")
def admin(control_plane: Cluster) -> Iterator[Admin]:
    if control_plane.ca_file is None:
        pytest.skip("needs a cluster of its own: the administrator's token is used directly")
    found = Admin(control_plane)
    install(found)
    yield found
    found.close()


@pytest.fixture
def world(control_plane: Cluster, admin: Admin, tmp_path: Path) -> Iterator[World]:
    with new_world(control_plane, admin, tmp_path) as made:
        yield made


def test_an_applied_example_becomes_ready_and_explains_itself(world: World) -> None:
    import yaml

    example = yaml.safe_load((Path(__file__).parents[2] / "examples" / "llmservice.yaml").read_text())
    world.namespace.apply_service(example["spec"])
    world.until_ready()
    status = world.namespace.service()["status"]
    assert {condition["type"]: condition["status"] for condition in status["conditions"]} == {
        "Ready": "True", "PrefillReady": "True", "DecodeReady": "True", "GatewayReady": "True", "TransferReady": "True",
        "Progressing": "False", "Degraded": "False",
    }  # fmt: skip
    assert status["pools"]["decode"]["summary"] == "1/1"
    line = world.kubectl("get", "llm", "chat", "--no-headers").split()
    assert line[:6] == ["chat", "True", "smollm2", "1/1", "1/1", "Auto"]
    until("event of what status says", lambda: "Ready" in _reasons(world))
    assert _reasons(world) == {"FirstRevision", "Ready"}


def test_every_child_is_owned_labelled_and_applied_by_our_field_manager(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    uid = world.namespace.service()["metadata"]["uid"]
    children = [*world.namespace.deployments().values(), world.namespace.pool("chat-decode")]
    children += [
        found for found in world.namespace.list("v1", "services") if found["metadata"]["name"].startswith("chat")
    ]
    assert len(children) >= 9
    for child in children:
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (uid, True)
        assert any(
            entry["manager"] == FIELD_MANAGER and entry["operation"] == "Apply"
            for entry in child["metadata"]["managedFields"]
        )
    assert world.namespace.service()["metadata"].get("finalizers", []) == []


def test_at_rest_nothing_is_called(world: World) -> None:
    """Neither reads nor writes, through ten looks at the service and a restart of the operator."""
    world.apply(SPEC)
    world.until_at_rest()
    world.until_quiet()
    world.operator.kill()
    world.proxy.forget_calls()
    world.operator.start()
    until("synced", world.operator.is_synced)
    until("looked at, probed and looked at again", lambda: world.num_passes() >= 2)
    world.until_quiet(4.0)
    assert world.proxy.recording.mutating == []
    asked = len([call for call in world.proxy.recording.calls if call.verb == "get"])
    for number in range(10):  # a label of the user's own is no change of what is asked for, but has it looked at
        num_passes = world.num_passes()
        patch = {"metadata": {"labels": {"looked-at": str(number)}}}
        world.namespace.admin.merge(world.namespace.path("serving.baton.dev/v1alpha1", "llmservices", "chat"), patch)
        until("looked at", lambda before=num_passes: world.num_passes() > before)
    world.until_quiet(2.0)
    assert world.proxy.recording.mutating == []
    assert len([call for call in world.proxy.recording.calls if call.verb == "get"]) == asked


def test_a_pool_that_the_service_leaves_open_keeps_what_kubectl_scale_says(world: World) -> None:
    world.apply(OPEN)
    world.until_ready()
    world.kubectl("scale", "llmpool/chat-decode", "--replicas=3")
    until("three ready", lambda: world.namespace.pool("chat-decode")["status"]["readyReplicas"] == 3)
    world.namespace.apply_service({**OPEN, "engine": {"maxNumSeqs": 7}})  # a rollout
    until(
        "second revision serves", lambda: len(world.gateway.probes) and _revisions(world) == 1 and _serves_asked(world)
    )
    pool = world.namespace.pool("chat-decode")
    assert (pool["spec"]["replicas"], pool["status"]["replicas"]) == (3, 3)
    scale = json.loads(
        world.kubectl(
            "get",
            "--raw",
            f"/apis/serving.baton.dev/v1alpha1/namespaces/{world.namespace.name}/llmpools/chat-decode/scale",
        )
    )
    assert scale["spec"]["replicas"] == 3
    assert "serving.baton.dev/revision=" in scale["status"]["selector"]


def test_stated_replicas_are_put_back(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    world.kubectl("scale", "llmpool/chat-decode", "--replicas=4")
    until("two again", lambda: world.namespace.pool("chat-decode")["spec"]["replicas"] == 2)


def test_fields_of_others_stay_and_ours_come_back(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    path = world.namespace.path("v1", "services", "chat")
    world.namespace.admin.merge(path, {"metadata": {"annotations": {"theirs": "yes"}}})
    world.namespace.admin.merge(path, {"spec": {"selector": {"app.kubernetes.io/component": "nobody"}}})
    until(
        "our selector is back",
        lambda: (
            world.namespace.get("v1", "services", "chat")["spec"]["selector"]["app.kubernetes.io/component"]
            == "gateway"
        ),
    )
    assert world.namespace.get("v1", "services", "chat")["metadata"]["annotations"]["theirs"] == "yes"


def test_deleted_children_come_back(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    lost = [("v1", "services", "chat"), ("policy/v1", "poddisruptionbudgets", "chat-decode"),
            ("v1", "configmaps", "chat-routing"), ("v1", "serviceaccounts", "chat-worker"),
            ("serving.baton.dev/v1alpha1", "llmpools", "chat-decode"),
            ("apps/v1", "deployments", "chat-gateway")]  # fmt: skip
    for api_version, plural, name in lost:
        world.namespace.admin.call("DELETE", world.namespace.path(api_version, plural, name))
    for api_version, plural, name in lost:
        until(f"{plural}/{name} is back", lambda at=(api_version, plural, name): world.namespace.get(*at))
    world.until_ready()


def test_what_a_spec_drops_is_pruned(world: World) -> None:
    world.apply({**SPEC, "gateway": {"ingress": {"host": "chat.example"}}})
    world.until_ready()
    until("ingress made", lambda: world.namespace.get("networking.k8s.io/v1", "ingresses", "chat"))
    world.apply({**SPEC, "networkPolicies": False, "redis": {"mode": "None"}})
    until("ingress gone", lambda: world.namespace.get("networking.k8s.io/v1", "ingresses", "chat") is None)
    until("policies gone", lambda: world.namespace.list("networking.k8s.io/v1", "networkpolicies") == [])
    until("redis gone", lambda: "chat-redis" not in world.namespace.deployments())
    until("its secret gone", lambda: world.namespace.get("v1", "secrets", "chat-redis") is None)


def test_all_goes_with_the_service(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    world.namespace.delete_service()
    until("deployments collected", lambda: world.namespace.deployments() == {})
    until("pools collected", lambda: world.namespace.list("serving.baton.dev/v1alpha1", "llmpools") == [])
    until("secrets collected", lambda: world.namespace.list("v1", "secrets") == [])


def test_an_object_of_somebody_else_is_not_taken_over(world: World) -> None:
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "chat-routing"}, "data": {"theirs": "yes"}}
    world.namespace.admin.apply(world.namespace.path("v1", "configmaps", "chat-routing"), theirs)
    world.apply(SPEC)
    until("said so", lambda: world.namespace.condition("Degraded").get("reason") == "Refused")
    assert "chat-routing" in world.namespace.condition("Degraded")["message"]
    assert world.namespace.get("v1", "configmaps", "chat-routing")["data"] == {"theirs": "yes"}
    world.namespace.admin.call("DELETE", world.namespace.path("v1", "configmaps", "chat-routing"))
    world.until_ready()


def test_a_new_revision_serves_after_it_answered_a_probe(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    first = world.namespace.service()["status"]["servingRevision"]
    world.gateway.probes.clear()
    world.apply({**SPEC, "engine": {"maxNumSeqs": 7}})
    until("second serves", lambda: world.namespace.service()["status"]["servingRevision"] != first)
    second = world.namespace.service()["status"]["servingRevision"]
    assert second in {probe["revision"] for probe in world.gateway.probes}
    until("first is gone", lambda: _revisions(world) == 1)
    assert world.gateway.serving() == second
    until("events of both", lambda: {"TrialStarted", "RevisionServes"} <= _reasons(world))


def test_a_revision_that_never_answers_is_rolled_back_and_the_old_one_serves_on(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    first = world.namespace.service()["status"]["servingRevision"]
    world.kubelet.breaks_new = True
    world.apply({**SPEC, "engine": {"maxNumSeqs": 7}, "rollout": {"progressDeadline": "3s"}})
    until("rolled back", lambda: world.namespace.condition("Degraded").get("reason") == "RolledBack")
    status = world.namespace.service()["status"]
    assert status["servingRevision"] == first != status["revision"]
    assert world.namespace.condition("Ready")["status"] == "True"
    failed = f"chat-decode-{status['revision']}"
    until("the failed one let go", lambda: world.namespace.deployments()[failed]["spec"]["replicas"] == 0)
    world.apply(SPEC)  # back: nothing is left of it
    until("recovered", lambda: world.namespace.condition("Degraded").get("status") == "False")
    until("gone", lambda: _revisions(world) == 1)


def test_the_role_allows_what_is_called_and_nothing_else(world: World) -> None:
    """Calls recorded while a service lives through all that the operator can do to it."""
    world.apply({**SPEC, "gateway": {"ingress": {"host": "chat.example"}}})
    world.until_ready()
    until("ingress made", lambda: world.namespace.get("networking.k8s.io/v1", "ingresses", "chat"))
    world.apply({**SPEC, "engine": {"maxNumSeqs": 7}, "networkPolicies": False, "redis": {"mode": "None"}})
    until("second serves", lambda: _serves_asked(world) and _revisions(world) == 1)
    until("secret pruned", lambda: world.namespace.get("v1", "secrets", "chat-redis") is None)
    world.kubelet.breaks_new = True
    world.apply({**SPEC, "engine": {"maxNumSeqs": 8}})
    until("pods that do not start are looked at", lambda: ("", "pods", "list") in _permissions(world))
    used = _permissions(world)
    mandatory = [kind for kind in kinds.KINDS if not kind.is_optional]
    allowed = {
        (group, resource, verb)
        for rule in kinds.rules(mandatory)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert used == allowed


def test_health_and_metrics_say_how_old_the_last_look_is(world: World) -> None:
    world.apply(SPEC)
    world.until_ready()
    ages = json.loads(world.operator.http("/livez"))
    assert all(0 <= age < 60 for age in ages.values())
    text = world.operator.http("/metrics")
    pages = {name: kind for (process, name), (kind, _) in documented().items() if process == "operator"}
    assert types_of("operator", text) == pages, "what dashboards and alerts are held to"
    metrics = Metrics.parse(text)
    assert metrics.value("baton_operator_reconciles_total", outcome="changed") > 0
    assert metrics.value("baton_operator_reconcile_duration_seconds_count") > 0
    counted = 'baton_operator_managed_objects{kind="LLMService"} 1.0'
    until("counted at the next tick", lambda: counted in world.operator.http("/metrics"))
    assert world.operator.stop() == 0


def test_in_cluster_mode_services_of_every_namespace_are_served(world: World) -> None:
    """Beside the namespaced one: it has rights in one namespace only. Two operators do not disturb each other."""
    cluster, admin = world.cluster, world.namespace.admin
    assert cluster.ca_file is not None
    other = Namespace(admin, f"{world.namespace.name}-other")
    other.make()
    wide = Operator(cluster.url, cluster.ca_file, cluster.token, world.operator.folder, "--cluster")
    with running_operator(wide):
        other.apply_service(SPEC)
        until("made there", lambda: "chat-gateway" in other.deployments())
        world.apply(SPEC)
        world.until_ready()
        world.until_quiet()
        assert set(world.proxy.recording.created.values()) <= {1}
    other.remove()


def _reasons(world: World) -> set[str]:
    """Of the events on the service."""
    events = world.namespace.list("v1", "events")
    return {event["reason"] for event in events if event["involvedObject"]["kind"] == "LLMService"}


def _permissions(world: World) -> set[tuple[str, str, str]]:
    return {call.permission for call in world.proxy.recording.calls if call.verb != "discover"}


def _revisions(world: World) -> int:
    return len([name for name in world.namespace.deployments() if name.startswith("chat-decode-")])


def _serves_asked(world: World) -> bool:
    status = world.namespace.service()["status"]
    generation = world.namespace.service()["metadata"]["generation"]
    return status["servingRevision"] == status["revision"] and status["observedGeneration"] == generation

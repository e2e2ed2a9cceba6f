"""Why a pod does not run: what its status says, as words for a condition, and when the operator looks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from baton_operator.objects import COMPONENT_LABEL, REVISION_LABEL, Trouble
from baton_operator.plan import LOOK_INTERVAL_S, LookAtPods, RequeueAfter
from baton_operator.pods import troubles_of
from tests.unit.operator_world import Cluster, Memory

IMAGE = "registry.example/worker:1"
NO_IMAGE = Trouble("chat-prefill-1", "ImagePullBackOff", f"the image {IMAGE} cannot be pulled: not found")


def pod(name: str = "chat-decode-1", revision: str = "aaaa", **status: Any) -> dict[str, Any]:
    labels = {REVISION_LABEL: revision, COMPONENT_LABEL: name.split("-")[1]}
    return {"metadata": {"name": name, "labels": labels}, "status": status}


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return pod(containerStatuses=[{"name": "decode", "image": IMAGE, "ready": False, "state": state, **more}])


def said(found: dict[str, Any]) -> tuple[str, str] | None:
    trouble = troubles_of([found]).get(("aaaa", "decode"))
    return (trouble.reason, trouble.words) if trouble else None


def test_an_image_that_cannot_be_pulled_is_told_in_the_same_words_at_each_try() -> None:
    why = "failed to pull and unpack: not found"
    tries = [
        waiting("ErrImagePull", why),
        waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}": ErrImagePull: {why}'),
    ]
    assert {said(found) for found in tries} == {("ImagePullBackOff", f"the image {IMAGE} cannot be pulled: {why}")}
    bare = waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"')
    assert said(bare) == ("ImagePullBackOff", f"the image {IMAGE} cannot be pulled")


def test_a_pod_without_a_node_says_what_the_scheduler_says() -> None:
    words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    assert said(pod(conditions=[unscheduled])) == ("Unschedulable", words)


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        ({"exitCode": 1, "message": "one\nmodel: no such folder\n"}, "ended with 1 {}: model: no such folder"),
        ({"exitCode": 137, "reason": "OOMKilled"}, "was killed: out of memory {}"),
    ],
)
def test_a_container_that_crashes_is_told_in_the_same_words_while_it_waits_and_while_it_runs(
    ended: dict[str, Any], words: str
) -> None:
    expected = ("CrashLoopBackOff", f"container decode {words.format('and is started again and again')}")
    last = {"lastState": {"terminated": ended}}
    backing_off = waiting("CrashLoopBackOff", "back-off 10s restarting", **last)
    runs_again = waiting("")
    runs_again["status"]["containerStatuses"][0] |= {"state": {"running": {}}, **last}
    assert said(backing_off) == said(runs_again) == expected


def test_a_missing_secret_is_told_and_a_start_as_it_should_be_is_not() -> None:
    missing = waiting("CreateContainerConfigError", 'secret "key" not found')
    assert said(missing) == ("CreateContainerConfigError", 'secret "key" not found')
    assert said(waiting("ContainerCreating")) is None
    restarted = waiting("")
    restarted["status"]["containerStatuses"][0] |= {"ready": True, "lastState": {"terminated": {"exitCode": 1}}}
    assert said(restarted) is None
    assert said(pod()) is None


def test_long_words_are_cut() -> None:
    found = said(waiting("CreateContainerError", "x" * 5000))
    assert found is not None
    assert len(found[1]) < 400


# ---------------------------------------------------------------- when it looks, and what it tells


def in_trouble() -> Cluster:
    cluster = Cluster({"image": {"worker": "broken"}})
    cluster.troubles = {(cluster.desired.revision, "prefill"): NO_IMAGE}
    return cluster


def let_pass(cluster: Cluster, passes: int = 4) -> None:
    for _ in range(passes):
        cluster.reconcile()
        cluster.tick()
        cluster.now += 6


def looks(cluster: Cluster) -> bool:
    return any(isinstance(step, LookAtPods) for step in cluster.plan())


def wake_s(cluster: Cluster) -> float:
    return next(step.seconds for step in cluster.plan() if isinstance(step, RequeueAfter))


def test_a_service_without_its_workers_says_why_in_ready_and_in_the_pools_condition() -> None:
    cluster = in_trouble()
    let_pass(cluster)
    assert cluster.condition("Ready") == ("False", "ImagePullBackOff")
    for kind in ("Ready", "PrefillReady"):
        assert f"0 of 1 prefill workers ready ({NO_IMAGE})" in cluster.message(kind)
    assert cluster.message("DecodeReady") == "0 of 1 decode workers ready"


def test_pods_are_looked_at_a_while_after_they_went_missing_then_ever_more_seldom_and_never_at_rest() -> None:
    cluster = in_trouble()
    cluster.reconcile()
    cluster.tick()
    cluster.reconcile()
    began, times = cluster.now, [0.0]
    while times[-1] < 3600:
        cluster.now += wake_s(cluster)
        if looks(cluster):
            times.append(cluster.now - began)
        cluster.reconcile()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] <= 6
    assert gaps == sorted(gaps)
    assert gaps[-1] == LOOK_INTERVAL_S
    assert len(times) < 35

    whole = Cluster()
    whole.converge()
    whole.memory = Memory()
    whole.now += 1000
    assert not looks(whole)


def test_a_trial_and_its_end_say_what_its_pods_waited_for() -> None:
    cluster = Cluster()
    cluster.converge()
    cluster.set_spec({"image": {"worker": "broken"}, "rollout": {"progressDeadline": "60s"}})
    cluster.troubles = {(cluster.desired.revision, "prefill"): NO_IMAGE}
    let_pass(cluster)
    assert f"0 prefill workers ready ({NO_IMAGE})" in cluster.message("Progressing")
    assert cluster.condition("Ready") == ("True", "Routable")
    cluster.now += 60
    cluster.reconcile()
    cluster.reconcile()
    assert cluster.condition("Degraded") == ("True", "RolledBack")
    assert str(NO_IMAGE) in cluster.message("Degraded")


def test_gateways_and_redis_say_why_they_are_missing() -> None:
    cluster = Cluster()
    cluster.converge()
    gateway, redis = (Trouble(f"chat-{name}-1", "Unschedulable", "no room") for name in ("gateway", "redis"))
    cluster.troubles = {("", "gateway"): gateway, ("", "redis"): redis}
    body = next(found for ref, found in cluster.objects.items() if ref.name == "chat-gateway" and "status" in found)
    body["status"]["readyReplicas"] = 0
    for _ in range(4):
        cluster.reconcile()
        cluster.now += 6
    assert cluster.condition("Ready") == ("False", "Unschedulable")
    assert str(gateway) in cluster.message("GatewayReady")

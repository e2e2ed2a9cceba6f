"""The planner, step by step: what it writes, in which order, and what it never does."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from baton_operator.objects import (
    API_VERSION,
    FIELD_MANAGER,
    POOL_KIND,
    SEED_MANAGER,
    GatewayReport,
    Ref,
    StepFailure,
    ref_of,
)
from baton_operator.plan import (
    Apply,
    AskGateways,
    Delete,
    MakeSecret,
    Probe,
    RequeueAfter,
    Scale,
    Status,
    Step,
)
from tests.unit.operator_world import Cluster, Memory

ROUTING = Ref("v1", "ConfigMap", "chat-routing")
GATEWAY = Ref("apps/v1", "Deployment", "chat-gateway")
ROUTING = Ref("v1", "ConfigMap", "chat-routing")


def pools(prefill: int = 1, decode: int = 1, image: str = "good-0", **more: Any) -> dict[str, Any]:
    return {
        "pools": {"prefill": {"replicas": prefill}, "decode": {"replicas": decode}},
        "image": {"worker": image},
        **more,
    }


def at_rest(spec: dict[str, Any]) -> Cluster:
    cluster = Cluster(spec)
    cluster.converge()
    return cluster


def writes(steps: tuple[Step, ...]) -> list[Step]:
    return [step for step in steps if isinstance(step, Apply | MakeSecret | Scale | Delete | Status)]


def words(steps: tuple[Step, ...]) -> list[str]:
    """Steps in short, without the objects that have nothing to do with workers."""
    found: list[str] = []
    for step in steps:
        match step:
            case Apply(manifest=manifest) if ref_of(manifest) == ROUTING:
                found.append("routing")
            case Apply(manifest=manifest) if "serving.baton.dev/revision" in manifest["metadata"].get("labels", {}):
                found.append(
                    f"{manifest['metadata']['labels']['app.kubernetes.io/component']}={manifest['spec']['replicas']}"
                )
            case Scale(ref=ref, replicas=replicas):
                found.append(f"old {ref.name.split('-')[1]}={replicas}")
            case Delete(ref=ref):
                found.append(f"delete {ref.name.rpartition('-')[0]}")
            case Probe():
                found.append("probe")
            case _:
                pass
    return found


# ---------------------------------------------------------------- the first revision


def test_everything_is_made_in_one_pass_what_pods_need_before_the_pods() -> None:
    steps = Cluster(pools()).plan()
    made = [str(ref_of(step.manifest)) for step in steps if isinstance(step, Apply) and step.manager == FIELD_MANAGER]
    assert isinstance(steps[0], MakeSecret)
    assert (
        made.index("ServiceAccount/chat-worker")
        < made.index("LLMPool/chat-decode")
        < made.index("ConfigMap/chat-routing")
    )
    decode = next(name for name in made if name.startswith("Deployment/chat-decode-"))
    assert made.index("ConfigMap/chat-routing") < made.index(decode) < made.index("Deployment/chat-gateway")
    assert all(step.is_new for step in steps if isinstance(step, Apply))


def test_the_first_revision_serves_at_once_and_the_service_is_ready_when_a_probe_went_through() -> None:
    cluster = Cluster(pools())
    cluster.reconcile()
    assert cluster.serving_revision == cluster.desired.revision
    assert cluster.condition("Ready") == ("False", "NotUp")
    cluster.tick()
    cluster.reconcile()  # probes
    assert cluster.condition("Ready") == ("False", "NotProbed")
    cluster.reconcile()
    assert cluster.condition("Ready") == ("True", "Routable")
    assert cluster.condition("TransferReady") == ("True", "Probed")
    assert cluster.rollout["proven"]


def test_a_service_that_is_up_but_does_not_answer_is_not_ready() -> None:
    cluster = Cluster(pools(image="mute"))
    for _ in range(4):
        cluster.reconcile()
        cluster.tick()
        cluster.now += 10
    assert cluster.condition("DecodeReady") == ("True", "AllReady")
    assert cluster.condition("Ready") == ("False", "ProbeFailed")
    assert cluster.condition("TransferReady") == ("False", "ProbeFailed")


def test_a_service_at_rest_is_left_alone() -> None:
    cluster = at_rest(pools(2, 3))
    assert cluster.condition("Progressing") == ("False", "AtRest")
    for _ in range(10):
        cluster.now += 3600
        assert writes(cluster.plan()) == []
        cluster.reconcile()
    assert all(step.reason for step in cluster.plan() if isinstance(step, RequeueAfter))


def test_an_operator_that_was_started_anew_probes_and_writes_nothing() -> None:
    cluster = at_rest(pools())
    cluster.memory = Memory()
    before = cluster.num_writes
    assert words(cluster.plan()) == ["probe"]
    cluster.reconcile()
    cluster.reconcile()
    assert cluster.num_writes == before


def test_a_service_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    cluster = at_rest(pools())
    cluster.service["metadata"]["deletionTimestamp"] = "2026-11-23T00:00:00Z"
    assert cluster.plan() == ()


# ---------------------------------------------------------------- rollouts


def rollout_steps(cluster: Cluster, spec: dict[str, Any]) -> list[list[str]]:
    """What each pass does about workers after a change, until nothing is left to do."""
    cluster.set_spec(spec)
    found: list[list[str]] = []
    for _ in range(30):
        found.append(words(cluster.plan()))
        cluster.reconcile()
        cluster.tick()
        cluster.now += 2
    cluster.converge()
    return [step for step in found if step not in ([], ["probe"])]


def test_surge_brings_the_new_revision_up_whole_probes_it_and_lets_the_old_one_drain() -> None:
    cluster = at_rest(pools(2, 3))
    old = cluster.desired.revision
    assert rollout_steps(cluster, pools(2, 3, "good-1")) == [
        ["routing", "decode=3", "prefill=2"],  # beside the old one
        ["routing"],  # it answered the probe of the pass before
        ["old decode=0", "old prefill=0"],  # every gateway follows
        ["delete chat-decode", "delete chat-prefill"],
    ]
    assert cluster.serving_revision == cluster.desired.revision != old
    assert cluster.counts() == {(cluster.desired.revision, "decode"): 3, (cluster.desired.revision, "prefill"): 2}


def test_replace_keeps_one_old_worker_of_each_pool_until_the_new_revision_serves() -> None:
    spec = {"rollout": {"strategy": "Replace"}}
    cluster = at_rest(pools(2, 4, **spec))
    assert rollout_steps(cluster, pools(2, 4, "good-1", **spec)) == [
        ["routing", "old decode=1", "old prefill=1", "decode=0", "prefill=0"],
        ["decode=3", "prefill=1"],
        ["routing"],
        ["old decode=0", "old prefill=0"],
        ["delete chat-decode", "delete chat-prefill", "decode=4", "prefill=2"],
    ]


def test_replace_of_single_workers_takes_the_old_ones_away_first() -> None:
    spec = {"rollout": {"strategy": "Replace"}}
    cluster = at_rest(pools(**spec))
    steps = rollout_steps(cluster, pools(1, 1, "good-1", **spec))
    assert steps[:3] == [
        ["routing", "old decode=0", "old prefill=0", "decode=0", "prefill=0"],
        ["decode=1", "prefill=1"],
        ["routing"],
    ]


@pytest.mark.parametrize("strategy", ["Surge", "Replace"])
@pytest.mark.parametrize("image", ["broken", "mute"])
def test_a_revision_that_does_not_answer_by_the_deadline_is_rolled_back_and_not_tried_again(
    strategy: str, image: str
) -> None:
    spec = {"rollout": {"strategy": strategy, "progressDeadline": "5m"}}
    cluster = at_rest(pools(2, 2, **spec))
    good = cluster.desired.revision
    cluster.set_spec(pools(2, 2, image, **spec))
    cluster.converge()
    assert cluster.serving_revision == good
    bad = cluster.desired.revision
    assert cluster.counts() == {(good, "decode"): 2, (good, "prefill"): 2, (bad, "decode"): 0, (bad, "prefill"): 0}
    assert cluster.condition("Degraded") == ("True", "RolledBack")
    assert cluster.condition("Ready") == ("True", "Routable")
    assert [event.reason for event in cluster.events if event.type == "Warning"].count(
        "RolledBack"
    ) == 2  # step, condition
    cluster.now += 1e6
    assert writes(cluster.plan()) == []
    cluster.set_spec(pools(2, 2, image, gateway={"replicas": 2}, **spec))
    cluster.converge()
    assert cluster.serving_revision == good, "a change that does not shape workers is no new try"


def test_a_rolled_back_revision_gets_another_chance_after_another_one_was_asked_for() -> None:
    cluster = at_rest(pools())
    cluster.set_spec(pools(image="broken"))
    cluster.converge()
    cluster.set_spec(pools())
    cluster.converge()
    assert cluster.rollout["failed"] is None
    cluster.set_spec(pools(image="broken"))
    cluster.reconcile()
    assert cluster.rollout["candidate"] == cluster.desired.revision


def test_a_first_revision_that_never_came_up_gives_way_at_once() -> None:
    cluster = Cluster(pools(image="broken"))
    for _ in range(3):
        cluster.reconcile()
        cluster.tick()
    cluster.set_spec(pools())
    cluster.reconcile()
    assert cluster.serving_revision == cluster.desired.revision
    cluster.converge()
    assert len(cluster.workers()) == 2


def test_a_change_of_mind_in_the_middle_drops_the_trial_before_the_next_one_gets_workers() -> None:
    cluster = at_rest(pools(2, 2))
    cluster.set_spec(pools(2, 2, "broken"))
    cluster.reconcile()
    cluster.tick()
    abandoned = cluster.desired.revision
    cluster.set_spec(pools(2, 2, "good-2"))
    cluster.reconcile()
    assert cluster.counts()[cluster.desired.revision, "decode"] == 0
    cluster.converge()
    assert cluster.serving_revision == cluster.desired.revision
    assert abandoned not in {revision for revision, _ in cluster.workers()}


def test_going_back_in_the_middle_of_a_rollout_never_touches_the_serving_workers() -> None:
    cluster = at_rest(pools(2, 2))
    good = cluster.desired.revision
    cluster.set_spec(pools(2, 2, "good-1"))
    cluster.reconcile()
    cluster.tick()
    cluster.set_spec(pools(2, 2))
    for _ in range(6):
        cluster.reconcile()
        assert cluster.counts()[good, "decode"] == 2
        cluster.tick()
        cluster.now += 2
    assert {revision for revision, _ in cluster.workers()} == {good}


def test_no_old_worker_leaves_before_every_ready_gateway_follows() -> None:
    cluster = at_rest(pools(gateway={"replicas": 2}))
    old = cluster.desired.revision
    cluster.set_spec(pools(image="good-1", gateway={"replicas": 2}))
    for _ in range(20):
        cluster.reconcile()
        cluster.tick()
        cluster.serving = [cluster.desired.revision, old]  # one kubelet is late
        cluster.now += 2
        assert cluster.counts()[old, "decode"] == 1
    assert cluster.serving_revision == cluster.desired.revision
    assert any(isinstance(step, AskGateways) for step in cluster.plan())
    assert cluster.condition("Progressing") == ("True", "Draining")
    cluster.converge()
    assert (old, "decode") not in cluster.workers()


def given_up_and_late(strategy: str = "Surge", size: int = 2) -> tuple[Cluster, str]:
    """A first revision whose workers came when another one was asked for already, which has none yet."""
    rollout = {"rollout": {"strategy": strategy}}
    cluster = Cluster(pools(size, size, **rollout))
    cluster.reconcile()
    cluster.tick(only={GATEWAY})
    first = cluster.desired.revision
    cluster.set_spec(pools(size, size, "good-1", **rollout))
    cluster.reconcile()
    assert cluster.serving_revision == cluster.desired.revision, "nothing was there to protect"
    cluster.now += 1
    cluster.tick(only={ref for ref in cluster.objects if first in ref.name})
    cluster.serving = [cluster.desired.revision]
    return cluster, first


@pytest.mark.parametrize(("strategy", "kept"), [("Surge", 2), ("Replace", 1)])
def test_a_revision_that_was_given_up_and_came_late_stays_while_gateways_route_to_it(strategy: str, kept: int) -> None:
    cluster, first = given_up_and_late(strategy)
    for _ in range(5):
        cluster.reconcile()
        cluster.tick(only={ref for ref in cluster.objects if first in ref.name})
        cluster.now += 2
        assert min(cluster.counts()[first, role] for role in ("prefill", "decode")) >= kept
    assert cluster.counts()[first, "decode"] == cluster.counts()[first, "prefill"] == kept
    assert cluster.counts()[cluster.desired.revision, "decode"] > 0, "it leaves room for the one that should serve"
    assert f"{first} stays while requests go to it" in cluster.message("Progressing")
    cluster.converge()
    assert {revision for revision, _ in cluster.workers()} == {cluster.desired.revision}


def test_a_gateway_that_routes_to_a_leaving_revision_holds_it_whatever_its_file_says() -> None:
    """Pods of the new revision are ready, and this gateway cannot reach them."""
    cluster, first = given_up_and_late()
    cluster.tick()
    for _ in range(5):
        cluster.memory.gateways = (GatewayReport("g0", cluster.desired.revision, first),)
        cluster.memory.gateways_at = cluster.now
        assert not any(isinstance(step, Scale | Delete) for step in cluster.plan())
        assert any(isinstance(step, AskGateways) for step in cluster.plan())
        cluster.now += 2
    cluster.reconcile()  # asks
    cluster.now += 2
    assert any(isinstance(step, Scale) for step in cluster.plan())


def test_of_two_leaving_revisions_that_gateways_route_to_one_makes_room() -> None:
    cluster, first = given_up_and_late()
    second = cluster.desired.revision
    cluster.set_spec(pools(2, 2, "good-2"))
    cluster.reconcile()
    cluster.memory.gateways = tuple(
        GatewayReport(f"g{index}", cluster.desired.revision, routed) for index, routed in enumerate((first, second))
    )
    cluster.memory.gateways_at = cluster.now
    scaled = {step.ref.name.rpartition("-")[2] for step in cluster.plan() if isinstance(step, Scale)}
    assert len(scaled & {first, second}) == 1


def test_a_failed_revision_that_gateways_route_to_stays_until_the_serving_one_is_back() -> None:
    spec = {"rollout": {"progressDeadline": "5m"}}
    cluster = at_rest(pools(**spec))
    good = cluster.desired.revision
    cluster.set_spec(pools(image="mute", **spec))
    bad = cluster.desired.revision
    cluster.reconcile()
    cluster.tick()
    for role in ("prefill", "decode"):
        cluster.workers()[good, role]["status"]["readyReplicas"] = 0  # its nodes are gone
    cluster.now += 400
    for _ in range(4):
        cluster.reconcile()
        cluster.now += 2
    assert cluster.rollout["failed"] == bad
    assert cluster.counts()[bad, "decode"] == 1
    cluster.converge()  # the nodes are back
    assert cluster.counts()[bad, "decode"] == 0
    assert cluster.serving_revision == good


@pytest.mark.parametrize("strategy", ["Surge", "Replace"])
def test_a_third_revision_gets_room_while_gateways_live_on_a_failed_one(strategy: str) -> None:
    """The one that serves by name has no pair: its room is worth more to the one that is asked for."""
    spec = {"rollout": {"progressDeadline": "5m", "strategy": strategy}}
    cluster = at_rest(pools(2, 2, **spec))
    good = cluster.desired.revision
    cluster.set_spec(pools(2, 2, "mute", **spec))
    bad = cluster.desired.revision
    cluster.reconcile()
    for _ in range(3):
        cluster.tick()
        cluster.reconcile()
    cluster.now += 400
    unready(cluster, good)
    for _ in range(4):
        cluster.reconcile()
        unready(cluster, good)
        cluster.now += 2
    assert cluster.rollout["failed"] == bad
    cluster.set_spec(pools(2, 2, "good-2", **spec))
    third = cluster.desired.revision
    for _ in range(30):  # less than the deadline
        cluster.reconcile()
        cluster.tick()
        unready(cluster, good)
        cluster.now += 5
        assert cluster.serving_revision == third or cluster.has_pair(bad), "requests have somewhere to go all the time"
        for role in ("prefill", "decode"):
            assert sum(count for (_, of), count in cluster.counts().items() if of == role) <= room(strategy)
    assert cluster.serving_revision == third
    assert {revision for revision, _ in cluster.workers()} == {third}
    said = [event.message for event in cluster.events if event.reason == "RevisionServes"]
    assert said == [f"requests go to revision {bad}, {good} drains", f"requests go to revision {third}, {bad} drains"]


@pytest.mark.parametrize("answer", ["another", "nothing", "drains"])
def test_a_revision_that_not_every_gateway_lives_on_takes_nobodys_place(answer: str) -> None:
    cluster = at_rest(pools(2, 2))
    good = cluster.desired.revision
    cluster.set_spec(pools(2, 2, "good-1"))
    bad = cluster.desired.revision
    cluster.reconcile()
    cluster.tick()
    cluster.set_spec(pools(2, 2, "good-2"))
    unready(cluster, good)
    if answer == "drains":
        cluster.workers()[bad, "decode"]["spec"]["replicas"] = 0
    others = {"another": (good,), "nothing": (), "drains": (bad,)}[answer]
    cluster.memory.gateways = tuple(GatewayReport(f"g{i}", good, seen) for i, seen in enumerate((bad, *others)))
    if answer == "nothing":
        cluster.memory.gateways = ()
    cluster.reconcile()
    assert cluster.serving_revision == good


def unready(cluster: Cluster, revision: str) -> None:
    """Its nodes are gone."""
    for role in ("prefill", "decode"):
        if body := cluster.workers().get((revision, role)):
            body["status"]["readyReplicas"] = 0


def room(strategy: str) -> int:
    return 2 if strategy == "Replace" else 4


def test_a_trial_that_is_up_while_no_gateway_is_ready_ends_at_the_deadline_and_says_what_to_do() -> None:
    spec = {"rollout": {"progressDeadline": "5m"}}
    cluster = at_rest(pools(**spec))
    good = cluster.desired.revision
    cluster.set_spec(pools(image="good-1", **spec))
    cluster.reconcile()
    cluster.tick()
    cluster.objects[GATEWAY]["status"]["readyReplicas"] = 0
    cluster.now += 200
    cluster.reconcile()
    assert "no gateway is ready" in cluster.message("Progressing")
    assert any(isinstance(step, RequeueAfter) and step.seconds <= 100 for step in cluster.plan())
    cluster.now += 101
    cluster.reconcile()
    assert cluster.serving_revision == good
    assert cluster.condition("Degraded") == ("True", "RolledBack")
    message = cluster.message("Degraded")
    assert "no gateway is" in message
    assert "Deployment/chat-gateway" in message
    assert "Apply a mended spec" in message
    assert cluster.condition("GatewayReady") == ("False", "NoneReady")
    cluster.tick()
    cluster.converge()
    assert cluster.counts()[cluster.desired.revision, "decode"] == 0


def test_what_gateways_said_before_the_flip_counts_for_nothing() -> None:
    cluster = at_rest(pools())
    cluster.set_spec(pools(image="good-1"))
    while cluster.serving_revision != cluster.desired.revision:
        cluster.reconcile()
        cluster.tick()
        cluster.now += 2
    cluster.memory.gateways = (GatewayReport("g0", cluster.desired.revision),)  # of an earlier time that it served
    cluster.memory.gateways_at = cluster.now - 3600
    assert not any(isinstance(step, Scale) for step in cluster.plan())
    cluster.memory.gateways_at = cluster.now
    assert any(isinstance(step, Scale) for step in cluster.plan())


def test_an_operator_that_was_away_past_the_deadline_asks_before_it_judges() -> None:
    cluster = at_rest(pools())
    cluster.set_spec(pools(image="good-1"))
    cluster.reconcile()
    cluster.tick()
    cluster.memory, cluster.now = Memory(), cluster.now + 1e6
    cluster.converge()
    assert cluster.serving_revision == cluster.desired.revision


def test_an_answer_that_a_revision_gave_in_an_earlier_life_does_not_make_it_serve_again() -> None:
    cluster = at_rest(pools())
    first = cluster.desired.revision
    cluster.set_spec(pools(image="good-1"))
    cluster.converge()
    second = cluster.desired.revision
    cluster.set_spec(pools())
    assert cluster.memory.probes[first].is_ok
    cluster.reconcile()
    cluster.tick()
    cluster.now += 1
    assert any(isinstance(step, Probe) and step.revision == first for step in cluster.plan())
    cluster.reconcile()
    assert cluster.serving_revision == second
    cluster.converge()
    assert cluster.serving_revision == first


def test_a_service_without_hand_overs_is_probed_through_decode_alone() -> None:
    cluster = Cluster(pools(0, 1))
    cluster.reconcile()
    cluster.tick()
    probes = [step for step in cluster.plan() if isinstance(step, Probe)]
    assert [probe.is_remote for probe in probes] == [False]
    cluster.converge()
    assert cluster.condition("Ready") == ("True", "Routable")
    assert cluster.condition("TransferReady") == ("Unknown", "NotDisaggregated")


def test_a_lost_routing_file_is_written_again_with_the_revision_that_served() -> None:
    cluster = at_rest(pools())
    good = cluster.desired.revision
    cluster.set_spec(pools(image="broken"))
    cluster.reconcile()
    cluster.delete(ROUTING)
    cluster.reconcile()
    assert cluster.serving_revision == good


def test_a_routing_file_that_changed_since_it_was_read_is_not_written() -> None:
    cluster = at_rest(pools())
    stale = copy.deepcopy(cluster.observe())
    cluster.edit(ROUTING, ("metadata", "labels", "note"), "x")
    cluster.set_spec(pools(image="good-1"))
    cluster.reconcile(observed=stale)
    assert cluster.rollout["candidate"] is None


# ---------------------------------------------------------------- gateways and workers of two releases


def release(number: int, **gateway: Any) -> dict[str, Any]:
    """A spec in which the images of gateways and workers both are of one release, as after an upgrade of the chart."""
    return pools(gateway=gateway) | {"image": {"worker": f"good-{number}", "gateway": f"gateway-{number}"}}


def gateway_image(cluster: Cluster) -> str:
    return cluster.objects[GATEWAY]["spec"]["template"]["spec"]["containers"][0]["image"]


def test_gateways_get_another_image_only_when_the_revision_that_it_came_with_serves() -> None:
    """New gateways may refuse workers of the release that still serves: they speak one version of the protocol."""
    cluster = at_rest(release(1))
    cluster.set_spec(release(2))
    while cluster.serving_revision != cluster.desired.revision:
        assert gateway_image(cluster) == "gateway-1"
        cluster.reconcile()
        cluster.tick()
        cluster.now += 2
    cluster.reconcile()
    assert gateway_image(cluster) == "gateway-2"


def test_gateways_keep_their_image_when_a_revision_is_rolled_back_but_follow_their_number() -> None:
    cluster = at_rest(release(1))
    broken = release(2) | {"image": {"worker": "mute", "gateway": "gateway-2"}}
    cluster.set_spec(broken)
    cluster.converge()
    assert cluster.condition("Degraded") == ("True", "RolledBack")
    assert gateway_image(cluster) == "gateway-1"
    cluster.set_spec(broken | {"gateway": {"replicas": 3}})
    cluster.converge()
    assert (gateway_image(cluster), cluster.objects[GATEWAY]["spec"]["replicas"]) == ("gateway-1", 3)
    cluster.set_spec(release(3, replicas=2))
    cluster.converge()
    assert (gateway_image(cluster), cluster.objects[GATEWAY]["spec"]["replicas"]) == ("gateway-3", 2)


@pytest.mark.parametrize("image", ["good-2", "mute"], ids=["on trial", "rolled back"])
def test_gateways_that_somebody_deletes_come_back_as_the_serving_revision_had_them(image: str) -> None:
    """Those of the revision on trial might refuse the workers that serve, and its image may not even exist."""
    cluster = at_rest(release(1, maxQueueRequests=7))
    before = cluster.objects[GATEWAY]["spec"]["template"]["spec"]
    changed = release(2, maxQueueRequests=8) | {"image": {"worker": image, "gateway": "gateway-2"}}
    cluster.set_spec(changed)
    cluster.reconcile()
    if image == "mute":
        cluster.converge()
    cluster.delete(GATEWAY)
    cluster.reconcile(dies_after=0)  # what it had in memory is lost
    cluster.reconcile()
    after = cluster.objects[GATEWAY]["spec"]["template"]["spec"]
    assert after["containers"] == before["containers"]
    assert after["initContainers"] == before["initContainers"]
    cluster.converge()
    assert gateway_image(cluster) == ("gateway-1" if image == "mute" else "gateway-2")


def test_deleted_gateways_come_back_as_asked_for_where_nobody_knows_how_they_were() -> None:
    """The ConfigMap was written by an operator that kept no such memory, or somebody spoilt it."""
    cluster = at_rest(release(1))
    cluster.set_spec(release(2))
    cluster.reconcile()
    for spoilt in ("", "[]", '{"image": 7}', '{"image": "gateway-1", "args": "--http"}'):
        cluster.objects[ROUTING]["data"]["gateway.json"] = spoilt
        cluster.delete(GATEWAY)
        cluster.reconcile()
        assert gateway_image(cluster) == "gateway-2"


def test_gateways_that_change_without_their_image_do_not_wait_for_a_trial() -> None:
    cluster = at_rest(release(1))
    changed = release(1) | {"image": {"worker": "broken", "gateway": "gateway-1"}, "gateway": {"maxQueueRequests": 7}}
    cluster.set_spec(changed)
    cluster.reconcile()
    container = cluster.objects[GATEWAY]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][container["args"].index("--max-queue-requests") + 1] == "7"


def test_a_new_gateway_that_does_not_become_ready_beside_the_old_one_is_told() -> None:
    cluster = at_rest(release(1))
    cluster.objects[GATEWAY]["status"] |= {"replicas": 2, "readyReplicas": 1}
    cluster.reconcile()
    assert cluster.condition("GatewayReady") == ("True", "Changing")


# ---------------------------------------------------------------- replicas have one writer


def open_pools(image: str = "good-0", **decode: Any) -> dict[str, Any]:
    return {"pools": {"decode": decode}, "image": {"worker": image}}


def asked(cluster: Cluster, role: str) -> int:
    return cluster.objects[Ref(API_VERSION, POOL_KIND, f"chat-{role}")]["spec"]["replicas"]


def test_a_pool_left_open_is_seeded_once_and_then_whoever_scales_it_is_obeyed_through_rollouts() -> None:
    cluster = at_rest(open_pools(min=2))
    assert asked(cluster, "decode") == 2
    cluster.scale("decode", 5)
    cluster.converge()
    assert cluster.counts()[cluster.desired.revision, "decode"] == 5
    cluster.set_spec(open_pools("good-1", min=2))
    cluster.converge()
    assert asked(cluster, "decode") == cluster.counts()[cluster.desired.revision, "decode"] == 5


def test_more_or_fewer_than_the_bounds_are_asked_for_in_vain_but_not_fought() -> None:
    cluster = at_rest(open_pools(min=2, max=4))
    for replicas, expected in ((9, 4), (0, 2)):
        cluster.scale("decode", replicas)
        cluster.converge()
        assert asked(cluster, "decode") == replicas
        assert cluster.counts()[cluster.desired.revision, "decode"] == expected


def test_a_pool_whose_replicas_are_stated_is_put_back() -> None:
    cluster = at_rest(pools(1, 2))
    cluster.scale("decode", 5)
    cluster.converge()
    assert asked(cluster, "decode") == 2


def test_a_pool_that_is_let_go_keeps_its_size_until_somebody_scales_it() -> None:
    cluster = at_rest(pools(1, 3))
    cluster.set_spec(open_pools())
    steps = [step for step in cluster.plan() if isinstance(step, Apply) and step.manifest["kind"] == POOL_KIND]
    managers = [step.manager for step in steps if step.manifest["metadata"]["name"] == "chat-decode"]
    assert managers == [SEED_MANAGER, FIELD_MANAGER], "the other way round, replicas would be gone for a moment"
    cluster.converge()
    assert asked(cluster, "decode") == 3
    cluster.scale("decode", 4)
    cluster.converge()
    assert asked(cluster, "decode") == 4


def test_an_hpa_averages_over_the_serving_revision_alone() -> None:
    cluster = at_rest(pools())
    old = cluster.desired.revision
    cluster.set_spec(pools(image="broken"))
    cluster.reconcile()
    cluster.tick()
    cluster.reconcile()
    status = cluster.objects[Ref(API_VERSION, POOL_KIND, "chat-decode")]["status"]
    assert status["selector"].endswith(f"serving.baton.dev/revision={old}")
    assert (status["replicas"], status["readyReplicas"]) == (1, 1)


# ---------------------------------------------------------------- other people's hands


def test_a_field_that_somebody_changed_is_put_back_and_one_that_we_do_not_state_is_left() -> None:
    cluster = at_rest(pools())
    cluster.edit(GATEWAY, ("spec", "replicas"), 7)
    cluster.edit(GATEWAY, ("spec", "paused"), False)
    cluster.converge()
    assert cluster.objects[GATEWAY]["spec"]["replicas"] == 1
    assert cluster.objects[GATEWAY]["spec"]["paused"] is False


def test_an_object_that_somebody_deleted_is_made_again() -> None:
    cluster = at_rest(pools())
    before = cluster.picture()
    for ref in list(cluster.objects):
        if ref != Ref("v1", "Secret", "chat-internal"):
            cluster.delete(ref)
            cluster.converge()
    assert cluster.picture() == before


def test_what_is_no_longer_asked_for_goes_when_no_old_worker_needs_it() -> None:
    cluster = at_rest(pools())
    redis = Ref("apps/v1", "Deployment", "chat-redis")
    cluster.set_spec(pools(redis={"mode": "None"}))
    cluster.reconcile()
    assert redis in cluster.objects
    cluster.converge()
    assert redis not in cluster.objects
    assert Ref("v1", "Secret", "chat-redis") not in cluster.objects


def test_an_object_of_somebody_else_is_neither_taken_over_nor_deleted() -> None:
    cluster = Cluster(pools())
    taken = Ref("v1", "Service", "chat")
    theirs = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "chat", "uid": "x", "resourceVersion": "1", "labels": {}},
    }
    cluster.objects[taken] = dict(theirs)
    for _ in range(5):
        cluster.reconcile()
        cluster.tick()
        cluster.now += 10
    assert cluster.objects[taken] == theirs
    assert cluster.condition("Degraded") == ("True", "Refused")
    assert writes(cluster.plan()) == []


def test_a_refused_step_is_told_in_the_status() -> None:
    cluster = at_rest(pools())
    observed = cluster.observe()
    failure = StepFailure(GATEWAY, "exceeded quota")
    steps = cluster.plan(type(observed)(observed.service, observed.objects, observed.probes, failures=(failure,)))
    (status,) = (step for step in steps if isinstance(step, Status) and step.ref.kind == "LLMService")
    degraded = next(found for found in status.status["conditions"] if found["type"] == "Degraded")
    assert (degraded["status"], degraded["message"]) == ("True", "Deployment/chat-gateway: exceeded quota")


def test_printer_columns_have_their_words() -> None:
    status = at_rest(pools(2, 4)).service["status"]
    assert status["pools"]["prefill"]["summary"] == "2/2"
    assert status["pools"]["decode"]["summary"] == "4/4"
    assert (status["model"], status["mode"], status["url"]) == ("smollm2", "Auto", "http://chat.ns.svc")


def test_a_serving_pool_that_grows_leaves_less_room_for_the_trial() -> None:
    """Found by the model: both grew in one pass, each beside what the other had before."""
    cluster = at_rest(pools(1, 1))
    old = cluster.desired.revision
    cluster.set_spec(pools(1, 1, "good-1"))
    while cluster.serving_revision == old:
        cluster.reconcile()
        cluster.tick()
        cluster.now += 2
    cluster.serving = [old]  # so the old one stays for the time being
    cluster.memory = Memory()
    cluster.set_spec(pools(1, 2, "good-2"))
    for _ in range(3):
        cluster.reconcile()
        assert sum(count for (_, role), count in cluster.counts().items() if role == "decode") <= 4

"""Crash and staleness plans in the manner of Sieve: every one must end in the state of the run without faults.

A fault hits one mutating call of the operator. `make soak` runs every kind of fault on every call of each workload; the
other runs take a seeded sample. Processes are really killed, connections really reset.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton_operator import crd
from tests.cluster.api_proxy import Fault, WatchFault
from tests.cluster.kube import Cluster
from tests.cluster.operator_world import REPOSITORY, Admin, World, end_state, install, new_world, until

pytestmark = pytest.mark.timeout(900)

SPEC: dict[str, Any] = {
    "pools": {"prefill": {"replicas": 1}, "decode": {"min": 2}},
    "gateway": {"ingress": {"host": "chat.example"}},
}
SECOND: dict[str, Any] = {"pools": SPEC["pools"], "engine": {"maxNumSeqs": 7}, "redis": {"mode": "None"}}
WORKLOADS = ("create", "rollout")
KINDS = {
    "killed after the write": Fault(0),
    "killed before the write": Fault(0, commits=False),
    "answer lost": Fault(0),
    "request lost": Fault(0, commits=False),
    "409": Fault(0, commits=False, code=409),
    "410": Fault(0, commits=False, code=410),
    "422": Fault(0, commits=False, code=422),
    "429": Fault(0, commits=False, code=429, retry_after_s=1),
    "500": Fault(0, commits=False, code=500),
    "500 after the write": Fault(0, code=500),
}
_SEED, _SAMPLE = 20261123, 8
_CONVERGED_S = 240.0  # of the machine of a test run, which may be busy
_AT_ONCE = 4
"""Plans of the soak, each in a namespace of its own: most of a plan is waiting."""


@dataclass(frozen=True)
class Plan:
    workload: str
    kind: str
    place: float
    """Which of the workload's mutating calls: 0 is the first, 1 the last."""

    def __str__(self) -> str:
        return f"{self.workload}: {self.kind} at {self.place:.2f}"


@dataclass
class Reference:
    """What a workload does and ends in without a fault."""

    num_mutating: int
    created: Counter[str]
    state: dict[str, Any]


def sample() -> list[Plan]:
    chance = random.Random(_SEED)
    kinds = ["killed after the write", "answer lost", *chance.sample(sorted(KINDS), _SAMPLE - 2)]
    return [Plan(chance.choice(WORKLOADS), kind, chance.random()) for kind in kinds]


@pytest.fixture(scope="module")
def admin(control_plane: Cluster) -> Iterator[Admin]:
    if control_plane.ca_file is None:
        pytest.skip("needs a cluster of its own: the administrator's token is used directly")
    found = Admin(control_plane)
    install(found)
    yield found
    found.close()


@pytest.fixture(scope="module")
def references(control_plane: Cluster, admin: Admin, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    found: dict[str, Reference] = {}
    for workload in WORKLOADS:
        with new_world(control_plane, admin, tmp_path_factory.mktemp("reference")) as world:
            begin(world, workload)
            run(world, workload)
            settle(world)
            recording = world.proxy.recording
            found[workload] = Reference(recording.num_mutating, num_created(world), end_state(world.namespace))
    return found


@pytest.mark.parametrize("plan", sample(), ids=str)
def test_a_fault_changes_nothing_of_the_end(
    plan: Plan, references: dict[str, Reference], control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    run_plan(plan, references[plan.workload], control_plane, admin, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_every_fault_at_every_call(
    references: dict[str, Reference], control_plane: Cluster, admin: Admin, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plans = [
        Plan(workload, kind, number / (reference.num_mutating - 1))
        for workload, reference in references.items()
        for kind in KINDS
        for number in range(reference.num_mutating)
    ]
    folder = tmp_path_factory.mktemp("plans")

    def end_of(number: int) -> str:
        try:
            (folder / str(number)).mkdir()
            run_plan(plans[number], references[plans[number].workload], control_plane, admin, folder / str(number))
        except (AssertionError, TimeoutError, RuntimeError) as error:
            return f"{plans[number]}: {type(error).__name__} {error}"
        return ""

    bad: list[str] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, words in enumerate(pool.map(end_of, range(len(plans))), 1):
            bad += [words] if words else []
            print(f"{done}/{len(plans)} plans, {len(bad)} bad: {words or plans[done - 1]}", flush=True)
    assert bad == []


def run_plan(plan: Plan, reference: Reference, cluster: Cluster, admin: Admin, folder: Path) -> None:
    """Raises: AssertionError with how the end differs."""
    with new_world(cluster, admin, folder) as world:
        begin(world, plan.workload)
        shape = KINDS[plan.kind]
        fault = Fault(
            1 + round(plan.place * (reference.num_mutating - 1)), shape.commits, shape.code, shape.retry_after_s,
            then=world.operator.kill if plan.kind.startswith("killed") else None,
        )  # fmt: skip
        world.proxy.faults.append(fault)
        run(world, plan.workload)
        until_end(world, reference.state, fault)
        created = num_created(world) - reference.created
        assert not created, f"made more than once: {created}"


def until_end(world: World, wanted: dict[str, Any], fault: Fault | None = None) -> None:
    """Raises: AssertionError with how the end differs. An operator that the fault killed is started again."""
    deadline = time.monotonic() + _CONVERGED_S
    while (state := end_state(world.namespace)) != wanted:
        if fault is not None and fault.was_hit and not world.operator.is_running():
            world.operator.start()
        assert time.monotonic() < deadline, f"{difference(wanted, state)}\n{world.operator.log[-3000:]}"
        time.sleep(0.1)


def begin(world: World, workload: str) -> None:
    """Come to where the workload starts."""
    until("synced", world.operator.is_synced)
    if workload == "rollout":
        world.apply(SPEC)
        world.until_ready()
        world.kubectl("scale", "llmpool/chat-decode", "--replicas=3")
        until("three", lambda: world.namespace.pool("chat-decode")["status"].get("readyReplicas") == 3)
        settle(world)
        world.proxy.forget_calls()


def run(world: World, workload: str) -> None:
    world.apply(SPEC if workload == "create" else SECOND)


def settle(world: World) -> None:
    world.until_at_rest()
    world.until_quiet()


def num_created(world: World) -> Counter[str]:
    """How often each object was made; the namespace is part of a revision's name."""
    return Counter(
        {re.sub(r"-[0-9a-f]{8}$", "-REVISION", name): n for name, n in world.proxy.recording.created.items()}
    )


def difference(wanted: Any, found: Any, path: str = "") -> str:
    """The first few places where two states differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(wanted.keys() | found.keys())
        parts = [difference(wanted.get(key), found.get(key), f"{path}/{key}") for key in keys]
        return "\n".join([part for part in parts if part][:8])
    return "" if wanted == found else f"{path}: wanted {json.dumps(wanted)[:200]}, found {json.dumps(found)[:200]}"


# ---------------------------------------------------------------- sequences of specs


FIXED: dict[str, Any] = {"prefill": {"replicas": 1}, "decode": {"replicas": 2}}
SPECS: list[dict[str, Any]] = [
    {"pools": FIXED},
    {"pools": FIXED, "redis": {"mode": "None"}, "networkPolicies": False},
    {"pools": FIXED, "gateway": {"replicas": 2, "serviceType": "NodePort", "ingress": {"host": "chat.example"}}},
    {"pools": {**FIXED, "decode": {"replicas": 3, "nodeSelector": {"gpu": "yes"}, "tolerations": [{"key": "gpu"}]}}},
    {"pools": FIXED, "engine": {"maxNumSeqs": 7}, "rollout": {"strategy": "Replace"}},
    {"pools": FIXED, "disaggregation": "Never", "gateway": {"maxQueueRequests": 9}},
]


def test_any_sequence_of_specs_ends_where_a_fresh_apply_of_the_last_one_ends(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """A field that was set and is taken away leaves nothing behind (Acto's most frequent bug)."""
    chance = random.Random(_SEED)
    sequence = [*chance.sample(SPECS[1:], 3), SPECS[0]]
    states: list[dict[str, Any]] = []
    for specs in (sequence, sequence[-1:]):
        with new_world(control_plane, admin, tmp_path) as world:
            for spec in specs:
                world.apply(spec)
                settle(world)
            states.append(end_state(world.namespace))
    assert difference(states[1], states[0]) == ""


# ---------------------------------------------------------------- staleness


def test_a_change_that_no_event_shows_is_found_by_the_next_list(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """A deleted child whose DELETED event is swallowed: the watch goes on, nobody is told."""
    with new_world(control_plane, admin, tmp_path, "--resync-s", "3") as world:
        world.apply(SPEC)
        world.until_ready()
        hidden = WatchFault("services", lambda event: event["type"] == "DELETED")
        world.proxy.watch_faults.append(hidden)
        world.namespace.admin.call("DELETE", world.namespace.path("v1", "services", "chat"))
        until("made again", lambda: world.namespace.get("v1", "services", "chat"))
        assert hidden.num_hidden == 1
        assert 'baton_operator_missed_changes_total{kind="Service"}' in world.operator.http("/metrics")


@pytest.mark.parametrize("ending", ["reset", "gone"])
def test_a_deletion_that_falls_into_a_gap_of_the_watch_is_found(
    ending: str, control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """The watch breaks at the event. After a reset it is sent again; after 410 only a new list shows it."""
    with new_world(control_plane, admin, tmp_path) as world:
        world.apply(SPEC)
        world.until_ready()
        fault = WatchFault("services", lambda event: event["type"] == "DELETED", ends_with=ending, only_once=True)
        world.proxy.watch_faults.append(fault)
        world.namespace.admin.call("DELETE", world.namespace.path("v1", "services", "chat"))
        until("made again", lambda: world.namespace.get("v1", "services", "chat"))


def test_a_pool_scaled_there_and_back_unseen_ends_where_it_is(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """3 -> 1 -> 3 without an event, and one that is seen in the end: no worker is taken away."""
    with new_world(control_plane, admin, tmp_path) as world:
        begin(world, "rollout")
        world.proxy.watch_faults.append(WatchFault("llmpools", lambda event: event["object"]["spec"]["replicas"] == 1))
        uids = {pod["metadata"]["uid"] for pod in world.namespace.list("v1", "pods")}
        for replicas in (1, 3):
            world.kubectl("scale", "llmpool/chat-decode", f"--replicas={replicas}")
        settle(world)
        assert {pod["metadata"]["uid"] for pod in world.namespace.list("v1", "pods")} == uids


def test_an_operator_that_starts_in_the_past_deletes_nothing_of_the_present(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """Its lists are those of a service that was deleted and made again since: every precondition misses."""
    with new_world(control_plane, admin, tmp_path) as world:
        begin(world, "rollout")
        world.operator.kill()
        world.operator.start()  # lists once more: what will be the past
        until("synced", world.operator.is_synced)
        world.operator.kill()
        world.namespace.delete_service()
        until("all collected", lambda: world.namespace.deployments() == {})
        world.proxy.go_stale()
        world.apply(SECOND)
        world.operator.start()
        until("synced", world.operator.is_synced)
        time.sleep(3.0)  # acts on the past meanwhile
        world.proxy.heal()
        settle(world)
        assert all(
            owner["uid"] == world.namespace.service()["metadata"]["uid"]
            for deployment in world.namespace.deployments().values()
            for owner in deployment["metadata"]["ownerReferences"]
        )
        deleted = [call for call in world.proxy.recording.calls if call.verb == "delete"]
        assert deleted == []


def test_events_that_come_twice_and_out_of_order_change_nothing_of_the_end(
    references: dict[str, Reference], control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """An older view after a newer one: whoever takes the last event for the present undoes its own work."""
    with new_world(control_plane, admin, tmp_path) as world:
        begin(world, "rollout")
        world.proxy.repeats_events = True
        world.operator.kill()  # watches that are open already do not count
        world.operator.start()
        begun = world.proxy.recording.num_mutating
        run(world, "rollout")
        until_end(world, references["rollout"].state)
        assert not num_created(world) - references["rollout"].created
        assert world.proxy.recording.num_mutating - begun <= 1.5 * references["rollout"].num_mutating


@pytest.mark.soak
def test_a_watch_that_brings_bookmarks_alone_is_made_up_for_by_lists(
    references: dict[str, Reference], control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """It looks alive and tells nothing: pods become ready, and nobody says so."""
    with new_world(control_plane, admin, tmp_path, "--resync-s", "3") as world:
        begin(world, "rollout")
        world.proxy.watch_faults.append(WatchFault("deployments", lambda _: True, ends_with="bookmark"))
        run(world, "rollout")
        until_end(world, references["rollout"].state)
        assert not num_created(world) - references["rollout"].created


# ---------------------------------------------------------------- versions


OLDER = (
    ("objects.py", "DRAIN_S = 30", "DRAIN_S = 20"),
    (
        "desired.py",
        '\n        yield self._policy("default", {SERVICE_LABEL: self.name}, ingress=[], egress=[])',
        '\n        yield self._policy("default", {SERVICE_LABEL: self.name}, ingress=[], egress=[])'
        '\n        yield self._policy("older", {SERVICE_LABEL: "nobody"}, ingress=[], egress=[])',
    ),
    ("desired.py", '"clusterIP": "None",\n', '"clusterIP": "None", "sessionAffinity": "ClientIP",\n'),
)
"""What another version makes differently: all worker pods and gateways, one object more, and one field more."""


def test_another_version_of_the_operator_takes_over_and_gives_back(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """An upgrade and a downgrade: each version brings its own to an end, and leaves nothing of the other's."""
    with new_world(control_plane, admin, tmp_path) as world:
        begin(world, "rollout")
        ours, code = end_state(world.namespace), world.operator.code
        world.operator.kill()
        world.operator.code = older_version(tmp_path)
        world.operator.start()
        until("theirs", lambda: world.namespace.get("networking.k8s.io/v1", "networkpolicies", "chat-older"))
        settle(world)
        services = {found["metadata"]["name"]: found for found in world.namespace.list("v1", "services")}
        assert services["chat-decode"]["spec"]["sessionAffinity"] == "ClientIP"
        assert {"20"} == {_drain_s(deployment) for deployment in _workers(world)}
        world.operator.kill()
        world.operator.code = code
        world.operator.start()
        until_end(world, ours)
        world.until_quiet()


def older_version(folder: Path) -> Path:
    code = folder / "older"
    shutil.copytree(REPOSITORY / "operator", code)
    for name, text, other in OLDER:
        path = code / "baton_operator" / name
        assert text in path.read_text(), f"{name} has changed; so must OLDER"
        path.write_text(path.read_text().replace(text, other))
    return code


def _workers(world: World) -> list[dict[str, Any]]:
    return [found for name, found in world.namespace.deployments().items() if name.startswith(("chat-p", "chat-d"))]


def _drain_s(deployment: dict[str, Any]) -> str:
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return arguments[arguments.index("--drain-s") + 1]


def test_a_crd_that_is_newer_than_the_operator_stops_nothing(
    control_plane: Cluster, admin: Admin, tmp_path: Path
) -> None:
    """Helm upgrades it first: then every object has the default of a field that the running operator does not know."""
    newer = crd.llmservice_crd()
    spec = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["properties"]["warp"] = {"type": "integer", "default": 9, "description": "a field of the next release"}
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{newer['metadata']['name']}"
    with new_world(control_plane, admin, tmp_path) as world:
        world.apply(SPEC)
        world.until_ready()
        admin.apply(path, newer)
        try:
            until("defaulted", lambda: "warp" in world.namespace.service()["spec"])
            world.apply({**SPEC, "engine": {"maxNumSeqs": 7}, "warp": 5})
            settle(world)
            status = world.namespace.service()["status"]
            assert status["revision"] == status["servingRevision"]
            # A watch begun before the upgrade hides the field until the API server ends it.
            until("named", lambda: "does not know spec.warp" in world.namespace.condition("Degraded")["message"])
        finally:
            install(admin)
            until("as before", lambda: "warp" not in world.namespace.service()["spec"])
        world.apply(SPEC)
        settle(world)
        until("all known", lambda: world.namespace.condition("Degraded")["message"] == "nothing is wrong")

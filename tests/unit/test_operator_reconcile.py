"""One pass against a fake API server: what a refusal, a conflict and a lost answer lead to."""

from __future__ import annotations

import base64
import itertools
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import pytest

from baton_operator.api import Api, Page
from baton_operator.apply import Executor, bare_secret
from baton_operator.cache import Cache
from baton_operator.desired import Platform
from baton_operator.errors import ApiError, Conflict, Refused, Unreachable
from baton_operator.kinds import Kind
from baton_operator.metrics import Metrics
from baton_operator.objects import API_VERSION, SERVICE_KIND, SERVICE_LABEL, Ref
from baton_operator.probe import Gateways
from baton_operator.reconcile import Reconciler, Settings

KEY = ("ns", "chat")
SERVICE = Ref(API_VERSION, SERVICE_KIND, "chat")
PLATFORM = Platform("gateway", "worker", "worker-cuda", "redis", "ns")


class FakeApi:
    """Objects by name, versions from one counter. `errors` are raised, once each, by the call on that object."""

    def __init__(self) -> None:
        self.objects: dict[Ref, dict[str, Any]] = {}
        self.calls: list[tuple[str, Ref]] = []
        self.errors: dict[tuple[str, str], ApiError] = {}
        self.pods: list[Mapping[str, Any]] = []
        self.commits_first = False
        self._versions = itertools.count(100)

    def put(self, manifest: Mapping[str, Any], namespace: str = "ns") -> dict[str, Any]:
        ref = Ref(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        number = next(self._versions)
        known = self.objects.get(ref, {"metadata": {"uid": f"uid-{number}"}})
        metadata = {**known["metadata"], **manifest["metadata"], "namespace": namespace, "resourceVersion": str(number)}
        self.objects[ref] = _merged(known, {**manifest, "metadata": {"generation": 1, **metadata}})
        return self.objects[ref]

    def _called(self, verb: str, ref: Ref) -> None:
        self.calls.append((verb, ref))
        error = self.errors.pop((verb, ref.name), None)
        if error is not None:
            raise error

    async def get(self, namespace: str, ref: Ref) -> Mapping[str, Any] | None:
        self._called("get", ref)
        return self.objects.get(ref)

    async def apply(self, namespace: str, manifest: Mapping[str, Any], manager: str = "") -> Mapping[str, Any]:
        ref = Ref(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        if self.commits_first:
            self.put(manifest)
        self._called("apply", ref)
        return self.put(manifest)

    async def apply_status(self, namespace: str, ref: Ref, uid: str, status: Mapping[str, Any]) -> Mapping[str, Any]:
        self._called("status", ref)
        return self.put({**self.objects[ref], "status": status})

    async def create(self, namespace: str, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        ref = Ref(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        self._called("create", ref)
        if ref in self.objects:
            raise Conflict(f"{ref} exists", 409)
        return self.put(manifest)

    async def list(self, kind: Kind, namespace: str) -> AsyncIterator[Page]:
        self._called("list", Ref(kind.api_version, kind.kind, kind.kind))
        assert (kind.plural, kind.selector, namespace) == ("pods", f"{SERVICE_LABEL}=chat", "ns")
        yield Page(self.pods, 1)

    def num(self, verb: str) -> int:
        return sum(called == verb for called, ref in self.calls if ref.kind != "Event")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What an apply leaves of fields that it does not state: all of them (no manager ever takes one away here)."""
    both = {key: _merged(old[key], new[key]) for key in new if isinstance(new[key], dict) and key in old}
    return {**old, **new, **both}


class World:
    def __init__(self, spec: Mapping[str, Any] | None = None) -> None:
        self.api = FakeApi()
        self.cache = Cache()
        self.metrics = Metrics()
        self.now = 1_000_000.0
        api = cast("Api", self.api)
        executor = Executor(api, self.cache, cast("Gateways", None), self.metrics)
        self.reconciler = Reconciler(
            self.cache, api, executor, self.metrics, Settings(PLATFORM), clock=lambda: self.now, jitter=lambda: 1.0
        )
        self.ask(spec or {})

    def ask(self, spec: Mapping[str, Any]) -> None:
        service = {"apiVersion": API_VERSION, "kind": SERVICE_KIND, "metadata": {"name": "chat"}, "spec": spec}
        self.cache.put(self.api.put(service))

    async def look(self) -> float | None:
        return await self.reconciler.reconcile(KEY)

    async def rest(self) -> float | None:
        """Look until a pass neither writes nor waits to be repeated at once."""
        for _ in range(20):
            delay_s = await self.look()
            if delay_s != 0.0:
                return delay_s
        raise AssertionError("no rest in 20 passes")

    def condition(self, kind: str) -> Mapping[str, Any]:
        conditions = self.api.objects[SERVICE]["status"]["conditions"]
        return next(condition for condition in conditions if condition["type"] == kind)


async def test_a_new_service_gets_everything_in_one_pass_and_nothing_in_the_next() -> None:
    world = World()
    assert await world.look() == 0.0, "a pass that wrote is followed by another at once"
    assert world.api.num("apply") > 15
    await world.rest()
    seen = len(world.api.calls)
    for _ in range(10):
        await world.look()
    assert len(world.api.calls) == seen


async def test_a_refused_step_is_told_in_the_status_and_holds_nothing_else_up() -> None:
    world = World()
    world.api.errors["apply", "chat-prefill"] = Refused("quota exceeded", 403)
    delay_s = await world.look()
    assert delay_s is not None
    assert 0.0 < delay_s <= 0.5
    assert Ref("policy/v1", "PodDisruptionBudget", "chat-gateway") in world.api.objects
    world.api.errors["apply", "chat-prefill"] = Refused("quota exceeded", 403)
    await world.look()
    assert "quota exceeded" in world.condition("Degraded")["message"]
    await world.rest()
    assert world.condition("Degraded")["status"] == "False"


@pytest.mark.parametrize("error", [Conflict("changed", 409), Unreachable("reset", 0), Unreachable("busy", 429, 7.0)])
@pytest.mark.parametrize("commits", [False, True])
async def test_a_lost_answer_ends_the_pass_and_the_next_one_finishes_it(error: Any, commits: bool) -> None:
    world = World()
    world.api.errors["apply", "chat-routing"] = error
    world.api.commits_first = commits
    delay_s = await world.look()
    assert delay_s == (7.0 if error.code == 429 else 0.5)
    assert Ref("v1", "ConfigMap", "chat-routing") not in world.cache.of(KEY)
    await world.rest()
    assert Ref("v1", "ConfigMap", "chat-routing") in world.cache.of(KEY)


async def test_delays_double_up_to_two_minutes() -> None:
    reconciler = World().reconciler
    delays = [reconciler.backoff_s(number) for number in range(1, 12)]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == 120.0


async def test_a_secret_whose_answer_was_lost_is_taken_as_it_is() -> None:
    world = World()
    world.api.errors["create", "chat-internal"] = Unreachable("reset", 0)
    await world.look()
    made = world.api.put({
        "apiVersion": "v1", "kind": "Secret", "data": {"secret": base64.b64encode(b"first").decode()},
        "metadata": {"name": "chat-internal", "ownerReferences": [{"uid": _uid(world), "controller": True}]},
    })  # fmt: skip
    await world.rest()
    assert world.api.objects[Ref("v1", "Secret", "chat-internal")]["data"] == made["data"]


async def test_a_name_that_somebody_else_has_is_not_taken_over() -> None:
    world = World()
    theirs = world.api.put({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "chat"}, "spec": {"theirs": 1}})
    await world.look()
    await world.look()
    assert world.api.objects[Ref("v1", "Service", "chat")] == theirs
    assert "Service/chat" in world.condition("Degraded")["message"]


async def test_a_deleted_secret_is_noticed_when_it_is_due() -> None:
    world = World()
    await world.rest()
    del world.api.objects[Ref("v1", "Secret", "chat-internal")]
    await world.look()
    assert Ref("v1", "Secret", "chat-internal") not in world.api.objects
    world.now += 3601.0
    await world.rest()
    assert Ref("v1", "Secret", "chat-internal") in world.api.objects


async def test_of_a_secret_only_its_owner_is_kept() -> None:
    """Of every service there are two in memory; managedFields alone are as large as all else."""
    secret = {
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque", "data": {"secret": "eA=="},
        "metadata": {"name": "chat-internal", "namespace": "ns", "uid": "u", "resourceVersion": "7",
                     "ownerReferences": [{"uid": "o", "controller": True}],
                     "labels": {"a": "b"}, "managedFields": [{"manager": "x"}]},
    }  # fmt: skip
    assert bare_secret(secret) == {
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "chat-internal", "namespace": "ns", "uid": "u", "resourceVersion": "7",
                     "ownerReferences": [{"uid": "o", "controller": True}]},
    }  # fmt: skip


async def test_a_service_that_is_being_deleted_is_left_alone() -> None:
    world = World()
    service = world.api.objects[SERVICE]
    world.cache.put(world.api.put({**service, "metadata": {**service["metadata"], "deletionTimestamp": "now"}}))
    assert await world.look() is None
    assert world.api.calls == []


async def test_fields_of_a_newer_crd_are_named_and_the_rest_is_looked_after() -> None:
    """While a CRD is newer than its operator, every object has the defaults of fields that the operator lacks."""
    tolerations = [{"key": "gpu", "sinceWhen": 3}]
    world = World(
        {"engine": {"maxNumSeqs": 7, "warp": 9}, "pools": {"decode": {"tolerations": tolerations}}, "new": {}}
    )
    await world.rest()
    assert "chat-gateway" in {ref.name for ref in world.api.objects}
    assert world.condition("Degraded") | {"lastTransitionTime": ""} == {
        "type": "Degraded", "status": "False", "reason": "Warnings", "observedGeneration": 1, "lastTransitionTime": "",
        "message": "this operator is older than the CRD and does not know spec.engine.warp, spec.new, "
        "spec.pools.decode.tolerations[0].sinceWhen: upgrade it",
    }  # fmt: skip


async def test_a_value_of_another_schema_is_named_and_nothing_is_touched() -> None:
    world = World({"disaggregation": "Nonsense"})
    assert await world.look() is None
    assert world.condition("Ready")["reason"] == "InvalidSpec"
    assert "Nonsense" in world.condition("Degraded")["message"]
    seen = len(world.api.calls)
    await world.look()
    assert len(world.api.calls) == seen


def _uid(world: World) -> str:
    return world.api.objects[SERVICE]["metadata"]["uid"]


async def test_why_pods_are_missing_is_asked_once_it_lasts_and_told() -> None:
    """Without the right to list pods the status says less, and nothing else suffers."""
    world = World()
    await world.rest()
    world.now += 6
    container = {"name": "decode", "image": "worker", "state": {"waiting": {"reason": "ErrImagePull"}}}
    revision = world.api.objects[SERVICE]["status"]["revision"]
    labels = {"serving.baton.dev/revision": revision, "app.kubernetes.io/component": "decode"}
    pod = {"metadata": {"name": "chat-decode-1", "labels": labels}, "status": {"containerStatuses": [container]}}
    world.api.pods = [pod]
    await world.rest()
    assert world.condition("Ready")["reason"] == "ImagePullBackOff"
    assert "the image worker cannot be pulled; pod chat-decode-1" in world.condition("DecodeReady")["message"]
    world.now += 60
    world.api.errors["list", "Pod"] = Refused("pods is forbidden", 403)
    await world.rest()
    assert world.condition("Ready")["reason"] == "NotUp"
    assert world.condition("Degraded")["status"] == "False"

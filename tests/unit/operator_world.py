"""A cluster in memory for the planner's tests: server-side apply, Deployments, gateways and probes, one tick at a time.

An image named `broken` never becomes ready; one named `mute` becomes ready and answers no probe.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from baton_operator.desired import Platform, desire
from baton_operator.objects import (
    API_VERSION,
    FIELD_MANAGER,
    POOL_KIND,
    REVISION_LABEL,
    Desired,
    GatewayReport,
    Observed,
    ProbeReport,
    Ref,
    Trouble,
    Where,
    is_owned,
    ref_of,
)
from baton_operator.plan import (
    Apply,
    AskGateways,
    Delete,
    Event,
    LookAtPods,
    MakeSecret,
    Probe,
    RequeueAfter,
    Scale,
    Status,
    Step,
    plan,
)
from baton_operator.resources import live_service
from baton_operator.rollout import ROUTING_FILE

PLATFORM = Platform("gateway:1", "good-0", "good-0-cuda", "redis:7", "baton-system")
Path = tuple[str, ...]


class Conflict(Exception):
    """A precondition that does not hold."""


@functools.lru_cache(maxsize=512)
def desired_of(spec: str, uid: str, generation: int, name: str) -> Desired:
    metadata = {"name": name, "namespace": "ns"}
    return desire(
        live_service({"metadata": metadata, "spec": json.loads(spec)}), PLATFORM, uid=uid, generation=generation
    )


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Lists are one value, as in an atomic list."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def put(body: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        body = body.setdefault(key, {})
    body[path[-1]] = copy.deepcopy(value)


def take(body: dict[str, Any], path: Path) -> None:
    for key in path[:-1]:
        body = body.get(key, {})
    body.pop(path[-1], None)


@dataclass
class Memory:
    """What the operator loses when it is killed."""

    probes: dict[str, ProbeReport] = field(default_factory=dict)
    gateways: tuple[GatewayReport, ...] = ()
    gateways_at: float = float("-inf")
    pods_at: float = float("-inf")
    troubles: dict[Where, Trouble] = field(default_factory=dict)


class Cluster:
    """One namespace with one LLMService `chat`."""

    def __init__(self, spec: dict[str, Any] | None = None) -> None:
        self.now = 1_000_000.0
        self.version = 0
        self.num_writes = 0
        self.events: list[Event] = []
        self.objects: dict[Ref, dict[str, Any]] = {}
        self.owned: dict[Ref, dict[str, dict[Path, Any]]] = {}  # by manager
        self.serving: list[str | None] = []  # what each gateway read last
        self.memory = Memory()
        self.troubles: dict[Where, Trouble] = {}  # what a look at the pods shows
        self.refused: set[str] = set()  # kinds that the API server refuses
        self.service: dict[str, Any] = {
            "apiVersion": API_VERSION, "kind": "LLMService", "spec": {},
            "metadata": {"name": "chat", "namespace": "ns", "uid": "uid-chat", "generation": 0},
        }  # fmt: skip
        self.set_spec(spec or {})

    # ------------------------------------------------------------ users

    def set_spec(self, spec: dict[str, Any]) -> None:
        if spec != self.service["spec"] or not self.service["metadata"]["generation"]:
            self.service["spec"] = copy.deepcopy(spec)
            self.service["metadata"]["generation"] += 1

    def scale(self, role: str, replicas: int) -> None:
        """`kubectl scale llmpool`, or an HPA."""
        ref = Ref(API_VERSION, POOL_KIND, f"chat-{role}")
        if ref in self.objects:
            self._write(ref, "somebody", {("spec", "replicas"): replicas}, keep=True)

    def delete(self, ref: Ref) -> None:
        self.objects.pop(ref, None)
        self.owned.pop(ref, None)

    def edit(self, ref: Ref, path: Path, value: Any) -> None:
        self._write(ref, "kubectl-edit", {path: value}, keep=True)

    # ------------------------------------------------------------ operator

    @property
    def desired(self) -> Desired:
        metadata = self.service["metadata"]
        return desired_of(json.dumps(self.service["spec"]), metadata["uid"], metadata["generation"], "chat")

    def observe(self) -> Observed:
        return Observed(
            service=self.service,
            objects=dict(self.objects),
            probes=dict(self.memory.probes),
            gateways=self.memory.gateways,
            gateways_at=self.memory.gateways_at,
            troubles=self.memory.troubles,
            pods_at=self.memory.pods_at,
        )

    def plan(self, observed: Observed | None = None) -> tuple[Step, ...]:
        return plan(self.desired, observed or self.observe(), self.now)

    def reconcile(self, *, dies_after: int | None = None, observed: Observed | None = None) -> None:
        """One pass; with `dies_after`, killed after so many steps: what it had in memory is lost."""
        for index, step in enumerate(self.plan(observed)):
            if index == dies_after:
                self.memory = Memory()
                return
            try:
                self.carry_out(step)
            except Conflict:
                return

    def carry_out(self, step: Step) -> None:
        match step:
            case Apply(manifest=manifest, manager=manager, is_new=is_new):
                self._apply(copy.deepcopy(dict(manifest)), manager, is_new)
            case MakeSecret(secret=secret):
                manifest = {**secret.manifest, "data": dict.fromkeys(secret.keys, "random")}
                if ref_of(manifest) not in self.objects:
                    self._apply(copy.deepcopy(manifest), FIELD_MANAGER, True)
            case Scale(ref=ref, replicas=replicas, uid=uid, resource_version=version):
                self._check(ref, uid, version)
                self._write(ref, FIELD_MANAGER, {("spec", "replicas"): replicas}, keep=True)
            case Delete(ref=ref, uid=uid, resource_version=version):
                if ref in self.objects:
                    self._check(ref, uid, version)
                    self.delete(ref)
                    self.num_writes += 1
            case Status(ref=ref, status=status):
                target = self.service if ref.kind == "LLMService" else self.objects[ref]
                assert target.get("status") != status, f"{ref}: a status that is there already is written"
                target["status"] = copy.deepcopy(dict(status))
                self.num_writes += 1
            case Probe(revision=revision, is_remote=is_remote):
                is_ok = self.answers(revision, is_remote)
                words = "1 KiB in 1 ms" if is_ok else "no answer"
                self.memory.probes[revision] = ProbeReport(revision, self.now, is_ok, is_remote, words)
            case AskGateways():
                self.memory.gateways = tuple(
                    GatewayReport(f"g{i}", seen, self.routed(seen)) for i, seen in enumerate(self.serving)
                )
                self.memory.gateways_at = self.now
            case LookAtPods():
                self.memory.troubles, self.memory.pods_at = dict(self.troubles), self.now
            case Event():
                self.events.append(step)
            case RequeueAfter():
                assert step.seconds > 0

    # ------------------------------------------------------------ the rest of the cluster

    def tick(self, only: set[Ref] | None = None) -> None:
        """Deployments get what they want; gateways read their file, unless only some Deployments are meant."""
        for ref, body in self.objects.items():
            if ref.kind == "Deployment" and (only is None or ref in only):
                wanted = body["spec"].get("replicas", 1)
                is_broken = body["spec"]["template"]["spec"]["containers"][0]["image"] == "broken"
                body["status"] = {
                    "observedGeneration": body["metadata"]["generation"],
                    "replicas": wanted,
                    "readyReplicas": 0 if is_broken else wanted,
                }
                body["metadata"]["resourceVersion"] = self._next_version()
        gateway = self.objects.get(Ref("apps/v1", "Deployment", "chat-gateway"), {})
        count = gateway.get("status", {}).get("readyReplicas", 0)
        self.serving = (self.serving + [self.serving_revision] * count)[:count]
        if only is None:
            self.serving = [self.serving_revision] * count

    def converge(self, *, passes: int = 60, seconds: float = 10.0) -> None:
        """Let everybody work until the operator has nothing to write."""
        quiet = 0
        for _ in range(passes):
            before = self.num_writes
            self.reconcile()
            self.tick()
            self.now += seconds
            quiet = quiet + 1 if self.num_writes == before else 0
            if quiet < 3:
                continue
            if self.rollout["candidate"] is None and not any(isinstance(step, AskGateways) for step in self.plan()):
                return
            self.now += 600  # nothing but time can bring this on
        raise AssertionError(f"does not come to rest; next: {self.plan()}")

    # ------------------------------------------------------------ questions

    @property
    def serving_revision(self) -> str | None:
        body = self.objects.get(Ref("v1", "ConfigMap", "chat-routing"))
        return json.loads(body["data"][ROUTING_FILE])["servingRevision"] if body and "data" in body else None

    @property
    def rollout(self) -> dict[str, Any]:
        return json.loads(self.objects[Ref("v1", "ConfigMap", "chat-routing")]["data"]["rollout.json"])

    def workers(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Worker Deployments by revision and role."""
        return {
            (labels[REVISION_LABEL], labels["app.kubernetes.io/component"]): body
            for ref, body in self.objects.items()
            if ref.kind == "Deployment" and REVISION_LABEL in (labels := body["metadata"]["labels"])
        }

    def counts(self) -> dict[tuple[str, str], int]:
        return {key: body["spec"]["replicas"] for key, body in self.workers().items()}

    def ready(self, revision: str | None, role: str) -> int:
        body = self.workers().get((revision or "", role), {})
        return body.get("status", {}).get("readyReplicas", 0)

    def answers(self, revision: str, is_remote: bool) -> bool:
        """Whether a probe of the revision goes through."""
        roles = ("prefill", "decode") if is_remote else ("decode",)
        bodies = [self.workers().get((revision, role), {}) for role in roles]
        images = {body["spec"]["template"]["spec"]["containers"][0]["image"] for body in bodies if body}
        return all(self.ready(revision, role) for role in roles) and "mute" not in images and bool(self.serving)

    def routed(self, serving: str | None) -> str | None:
        """Where a gateway that read `serving` would send a request: the rule of gateway/revisions.py."""
        found = sorted({revision for revision, _ in self.workers() if self.ready(revision, "decode")})
        complete = {revision for revision in found if self.has_pair(revision)}
        return max(found, key=lambda revision: (revision in complete, revision == serving, revision), default=None)

    def has_pair(self, revision: str) -> bool:
        return all(self.ready(revision, role) for role in ("prefill", "decode") if self.size(role))

    def size(self, role: str) -> int:
        """What the pool should have."""
        pool = self.desired.pools[role]
        asked = self.objects.get(Ref(API_VERSION, POOL_KIND, f"chat-{role}"), {}).get("spec", {}).get("replicas")
        return pool.replicas if pool.replicas is not None else pool.clamp(pool.seed if asked is None else asked)

    def condition(self, kind: str) -> tuple[str, str]:
        found = self._condition(kind)
        return found["status"], found["reason"]

    def message(self, kind: str) -> str:
        return self._condition(kind)["message"]

    def _condition(self, kind: str) -> dict[str, Any]:
        return next(found for found in self.service["status"]["conditions"] if found["type"] == kind)

    def picture(self) -> dict[str, Any]:
        """Everything that matters of the end state: without versions, times and whoever owns a field."""
        found: dict[str, Any] = {}
        for ref, body in self.objects.items():
            kept = {key: value for key, value in body.items() if key not in ("metadata", "status")}
            kept["labels"] = body["metadata"]["labels"]
            if ref.name == "chat-routing":
                memory = {key: value for key, value in self.rollout.items() if key != "since"}
                kept["data"] = (self.serving_revision, memory)
            found[str(ref)] = kept
        status = copy.deepcopy(self.service["status"])
        status.pop("observedGeneration")
        for condition in status["conditions"]:
            del condition["lastTransitionTime"], condition["observedGeneration"]
        return found | {"status": status}

    # ------------------------------------------------------------ the API server

    def _apply(self, manifest: dict[str, Any], manager: str, is_new: bool) -> None:
        ref = ref_of(manifest)
        live = self.objects.get(ref)
        if is_new and live is not None and not is_owned(live, self.service["metadata"]["uid"]):
            return  # refused: the edge looks first
        version = manifest["metadata"].pop("resourceVersion", None)
        if version is not None and (live is None or live["metadata"]["resourceVersion"] != version):
            raise Conflict(str(ref))
        self._write(ref, manager, dict(leaves(manifest)), keep=False)

    def _write(self, ref: Ref, manager: str, fields: dict[Path, Any], *, keep: bool) -> None:
        """Set fields for a manager; what it set before and does not now is removed, unless another one set it too."""
        self.num_writes += 1
        body = self.objects.setdefault(ref, {"metadata": {"uid": f"uid-{self.version}", "generation": 0}})
        managers = self.owned.setdefault(ref, {})
        before = copy.deepcopy(body.get("spec"))
        mine = managers.get(manager, {})
        others = {path for name, owned in managers.items() if name != manager for path in owned}
        for path in set(mine) - set(fields) if not keep else ():
            if path not in others:
                take(body, path)
        managers[manager] = {**mine, **fields} if keep else fields
        for path, value in fields.items():
            for name, owned in managers.items():
                if name != manager and path in owned and owned[path] != value:
                    del owned[path]
            put(body, path, value)
        metadata = body["metadata"]
        metadata["generation"] += body.get("spec") != before
        metadata["resourceVersion"] = self._next_version()
        metadata["managedFields"] = [
            {"manager": name, "fieldsV1": {"f:spec": {"f:replicas": {}}} if ("spec", "replicas") in owned else {}}
            for name, owned in managers.items()
        ]

    def _check(self, ref: Ref, uid: str, version: str) -> None:
        metadata = self.objects.get(ref, {}).get("metadata", {})
        if (metadata.get("uid"), metadata.get("resourceVersion")) != (uid, version):
            raise Conflict(str(ref))

    def _next_version(self) -> str:
        self.version += 1
        return str(self.version)


def open_pools(cluster: Cluster) -> list[str]:
    """The roles whose size is others' to set."""
    return [role for role, pool in cluster.desired.pools.items() if pool.replicas is None]


@functools.lru_cache(maxsize=256)
def fresh(spec: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """What a fresh apply of a spec makes, with pools scaled to the same sizes by others."""
    cluster = Cluster(json.loads(spec))
    cluster.converge()
    for role, replicas in sizes:
        cluster.scale(role, replicas)
    cluster.converge()
    return cluster.picture()

"""Names, labels and value types that the pure parts of the operator share. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Manifest: TypeAlias = Mapping[str, Any]
"""A Kubernetes object as parsed JSON."""

API_VERSION = "serving.baton.dev/v1alpha1"
SERVICE_KIND = "LLMService"
POOL_KIND = "LLMPool"
FIELD_MANAGER = "baton-operator"
SEED_MANAGER = "baton-operator-seed"
"""Owns spec.replicas of a pool that others scale, from its making until somebody scales it."""

SERVICE_LABEL = "serving.baton.dev/service"
REVISION_LABEL = "serving.baton.dev/revision"
COMPONENT_LABEL = "app.kubernetes.io/component"
HASH_ANNOTATION = "serving.baton.dev/applied"
"""Digest of the manifest that was applied last: a field that was taken away changes it, though no live field does."""

PROBER_LABEL = "serving.baton.dev/prober"
"""With the value "true" on pods that may reach a gateway's internal port: the operator and `helm test`."""

ROLES = ("prefill", "decode")
API_PORT = 8000
INTERNAL_PORT = 8001
GRPC_PORT = 7000
HEALTH_PORT = 7001
REDIS_PORT = 6379
UCX_PORTS = (7100, 7199)
"""First and last of the TCP ports at which a worker's memory is read where NIXL may use TCP."""

DRAIN_S = 30
"""What running requests have to finish when a pod is stopped."""


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """An object in the service's own namespace."""

    api_version: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


def ref_of(manifest: Manifest) -> Ref:
    return Ref(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])


def status_of(body: Manifest | None) -> Manifest:
    """The status of a live object; empty where it has none yet."""
    found: Manifest | None = (body or {}).get("status")
    return found or {}


def is_owned(body: Manifest, uid: str) -> bool:
    """Whether the object is controlled by the LLMService of this uid."""
    owners = body["metadata"].get("ownerReferences") or ()
    return any(owner.get("uid") == uid and owner.get("controller") for owner in owners)


@dataclass(frozen=True, slots=True)
class RandomSecret:
    """A Secret whose values are drawn once, when it does not exist, and never written again.

    `manifest` has no data; `keys` names each key that gets 32 random bytes as 64 hex digits.
    """

    manifest: Manifest
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DesiredPool:
    """What one role should have. Replicas are the planner's: no manifest here states them."""

    role: str
    pool: Manifest
    deployment: Manifest  # of the desired revision
    replicas: int | None  # stated: the operator owns them; None: whoever scales the LLMPool
    seed: int  # for a pool that nobody has scaled yet
    least: int
    most: int

    def clamp(self, replicas: int) -> int:
        return max(self.least, min(self.most, replicas))


@dataclass(frozen=True, slots=True)
class Desired:
    """All that a service should consist of, in the order in which it is made. `desired.py` makes it."""

    namespace: str
    name: str
    uid: str
    generation: int
    revision: str
    model: str  # served name, for the printer column
    url: str
    mode: str  # Auto, Always, Never: printer column; Never: a probe goes through decode alone
    replaces: bool  # rollout strategy Replace
    progress_deadline_s: float
    secrets: tuple[RandomSecret, ...]
    before: tuple[Manifest, ...]  # service accounts, network policies, Services, Redis: what pods need
    pools: Mapping[str, DesiredPool]  # by role
    routing: Manifest  # the ConfigMap without data
    gateway: Manifest  # its Deployment
    after: tuple[Manifest, ...]  # PDBs, ServiceMonitor, HTTPRoute, Ingress, InferencePool: what needs the rest
    warnings: tuple[str, ...] = field(default=())  # fields that mean nothing here, APIs that the cluster lacks

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Everything but the Secrets' values, Deployments of the desired revision included."""
        pools = [pool.pool for pool in self.pools.values()]
        workers = [pool.deployment for pool in self.pools.values()]
        return (*self.before, *pools, self.routing, *workers, self.gateway, *self.after)


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the last `Probe` of a revision found. Kept in memory by the caller; gone after its restart."""

    revision: str
    at: float  # the caller's `now` when the answer came
    is_ok: bool
    is_remote: bool  # as the Probe asked
    message: str  # of a failure: why; of a success: "24.0 KiB in 3.1 ms over grpc, chat-prefill-... to chat-decode-..."


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """What one gateway pod said of itself (GET /internal/status).

    `serving_revision` is what its routing file said last; None: it did not answer. `routed_revision` is where it would
    send a request now, which is another one while the serving revision has no pair; None: the request would wait.
    """

    address: str
    serving_revision: str | None
    routed_revision: str | None = None
    is_registry_connected: bool = True


Where: TypeAlias = tuple[str, str]
"""Revision ("" for gateways and Redis) and component of pods."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a pod that should run waits for in vain."""

    pod: str
    reason: str  # one word, fit for a condition
    words: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.words}; pod {self.pod}"


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step of the last pass that the API server refused (not: a conflict or a lost connection, which are retried)."""

    ref: Ref
    message: str


@dataclass(frozen=True, slots=True)
class Observed:
    """What is there. `observe.py` makes it from caches, without a call to the API server.

    `service` and `objects` are live objects as the API server has them (managedFields included for LLMPools). `objects`
    holds everything in the namespace that carries the service's label, owned by it or not, of every kind that
    `Desired.manifests` and `Desired.secrets` can hold, and Deployments of other revisions.
    """

    service: Manifest
    objects: Mapping[Ref, Manifest]
    probes: Mapping[str, ProbeReport] = field(default_factory=dict[str, "ProbeReport"])  # the last of each revision
    gateways: tuple[GatewayReport, ...] = ()  # of the last AskGateways; empty after a restart
    gateways_at: float = float("-inf")
    failures: tuple[StepFailure, ...] = ()  # of the last pass, for the condition Degraded
    troubles: Mapping[Where, Trouble] = field(default_factory=dict[Where, Trouble])  # of the last LookAtPods
    pods_at: float = float("-inf")

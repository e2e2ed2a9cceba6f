"""Every kind of object that the operator touches, how it finds it, and the exact verbs it uses. Pure.

The chart's Role is made from this table (`rules`), and a test compares the table with recorded calls: a verb that is
missing here fails the operator in the tests, one that nobody uses fails the test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from baton_operator.objects import API_VERSION, POOL_KIND, SERVICE_KIND, SERVICE_LABEL

_KEPT = ("list", "watch", "get", "create", "patch")
"""list, watch: cache; get: look before a first apply; create, patch: server-side apply."""
_CHILD = (*_KEPT, "delete")
"""Of some kinds a spec may ask for less than it did; what goes with the service, garbage collection deletes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind. `selector` is the label selector of its list and watch; a kind that is not watched has no `list`."""

    api_version: str
    kind: str
    plural: str
    verbs: tuple[str, ...]
    why: str
    selector: str = SERVICE_LABEL
    status_verbs: tuple[str, ...] = ()
    is_optional: bool = False
    """Part of no Kubernetes; used where the cluster has it."""

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.api_version.rpartition("/")[2]

    @property
    def is_watched(self) -> bool:
        return "watch" in self.verbs

    @property
    def api(self) -> str:
        """As `desired.Platform.apis` names it."""
        return f"{self.api_version}/{self.kind}"


KINDS: tuple[Kind, ...] = (
    Kind(
        API_VERSION, SERVICE_KIND, "llmservices", ("list", "watch"), "what is asked for; only its status is written",
        selector="", status_verbs=("patch",),
    ),
    Kind(
        API_VERSION, POOL_KIND, "llmpools", _KEPT,
        "replicas of a pool; it goes with its service", status_verbs=("patch",),
    ),
    Kind("apps/v1", "Deployment", "deployments", _CHILD, "workers of each revision, gateway, Redis"),
    Kind("v1", "Service", "services", _CHILD, "the API, worker addresses, Redis"),
    Kind(
        "v1", "ConfigMap", "configmaps", _KEPT,
        "the serving revision, read by the gateways",
    ),
    Kind("v1", "ServiceAccount", "serviceaccounts", _KEPT, "identities"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", _CHILD, "who may reach which pod"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", _KEPT, "evictions one by one"),
    Kind("networking.k8s.io/v1", "Ingress", "ingresses", _CHILD, "spec.gateway.ingress"),
    Kind(
        "gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes", _CHILD, "spec.gateway.httpRoute", is_optional=True
    ),
    Kind(
        "inference.networking.k8s.io/v1", "InferencePool", "inferencepools", _CHILD, "spec.gateway.httpRoute.backend",
        is_optional=True,
    ),
    Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors", _CHILD, "Prometheus", is_optional=True),
    # No list and no watch: either shows every value of every Secret of the namespace.
    Kind(
        "v1", "Secret", "secrets", ("get", "create", "delete"),
        "a service's own secrets: drawn once; the one of its gateways is shown to them",
    ),
    # Not watched: a thousand services have many pods, and only one that does not start has anything to tell.
    Kind("v1", "Pod", "pods", ("list",), "why one does not start: listed while a pool or gateway lacks some"),
    Kind("discovery.k8s.io/v1", "EndpointSlice", "endpointslices", ("list", "watch"), "addresses of the gateways"),
    Kind("v1", "Event", "events", ("create",), "what was done, on the LLMService"),
)  # fmt: skip

BY_KIND = {(kind.api_version, kind.kind): kind for kind in KINDS}


def watched(apis: Collection[str]) -> tuple[Kind, ...]:
    """The kinds to keep in the cache, of the optional ones those that the cluster has."""
    return tuple(kind for kind in KINDS if kind.is_watched and (not kind.is_optional or kind.api in apis))


def optional() -> tuple[Kind, ...]:
    return tuple(kind for kind in KINDS if kind.is_optional)


def rules(kinds: Iterable[Kind] = KINDS) -> list[dict[str, Any]]:
    """Rules of a Role (or ClusterRole) that allow this and nothing else."""
    found: list[dict[str, Any]] = []
    for kind in kinds:
        found.append({"apiGroups": [kind.group], "resources": [kind.plural], "verbs": list(kind.verbs)})
        if kind.status_verbs:
            status = {"resources": [f"{kind.plural}/status"], "verbs": list(kind.status_verbs)}
            found.append({"apiGroups": [kind.group], **status})
    return found

"""Decide what to do next for one LLMService: observed + desired + now -> steps. Pure, standard library only.

`plan` is level-triggered: it looks at what is there and says everything that may be done now, in order. Carrying out
any prefix of its steps, or the same steps twice, and planning again ends in the same state. A plan of nothing but
`RequeueAfter` (or of nothing) writes nothing.

A rollout keeps its memory in one object, the ConfigMap `<name>-routing`: `routing.json` says which revision serves
(the gateways read it), `rollout.json` whether that revision ever answered a probe, which candidate is on trial since
when, and which one failed. It is written with the resourceVersion that was read, so a stale view cannot move it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from baton_operator.objects import FIELD_MANAGER, Desired, Manifest, Observed, RandomSecret, Ref


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply with force.

    The manifest carries its HASH_ANNOTATION. `is_new`: no such object was seen, so look first (one live GET): an object
    of that name that this service does not control is refused (StepFailure), not taken over. Where the manifest has
    metadata.resourceVersion, a conflict (409) ends the pass; plan again.
    """

    manifest: Manifest
    reason: str
    is_new: bool = False
    manager: str = FIELD_MANAGER


@dataclass(frozen=True, slots=True)
class MakeSecret:
    """Create with random values; that it exists already is success."""

    secret: RandomSecret
    reason: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Set spec.replicas of a Deployment of a revision that is not the desired one, by merge patch.

    The patch carries `uid` and `resource_version` in its metadata, so that it hits what was seen or nothing.
    """

    ref: Ref
    replicas: int
    uid: str
    resource_version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete with both preconditions and propagation policy Background; that it is gone is success."""

    ref: Ref
    uid: str
    resource_version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Probe:
    """POST /internal/probe to a ready gateway; keep the answer as the service's ProbeReport and plan again."""

    revision: str
    is_remote: bool  # P to D; False where there is no prefill worker or no disaggregation: through decode alone
    reason: str


@dataclass(frozen=True, slots=True)
class AskGateways:
    """GET /internal/status of every gateway pod; keep the answers as GatewayReports and plan again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Event:
    """A Kubernetes Event on the LLMService. Emitted with the step before it, so never for a pass without change."""

    type: str  # Normal, Warning
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Status:
    """Replace the status subresource of the LLMService or of an LLMPool (server-side apply). Only when it differs."""

    ref: Ref
    status: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RequeueAfter:
    """Plan again after so long even if nothing happens. The caller adds jitter. At most one, the last step."""

    seconds: float
    reason: str


Step: TypeAlias = Apply | MakeSecret | Scale | Delete | Probe | AskGateways | Event | Status | RequeueAfter
"""In order. Everything but Probe, AskGateways, Event and RequeueAfter mutates."""


def plan(desired: Desired, observed: Observed, now: float) -> tuple[Step, ...]:
    """What to do now. `now` is wall-clock seconds: the rollout's start is kept in the cluster."""
    raise NotImplementedError

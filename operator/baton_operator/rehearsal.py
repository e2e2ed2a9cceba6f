"""Play a change through without a cluster: the planner, and pods and gateways that do at once what they should. Pure.

What `baton plan` prints is what the planner decides, not a description of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from baton_operator.objects import (
    REVISION_LABEL,
    SEED_MANAGER,
    SERVICE_KIND,
    Desired,
    GatewayReport,
    Manifest,
    Observed,
    ProbeReport,
    Ref,
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

_MOST_PASSES = 40  # a rollout takes six


def rehearse(before: Desired | None, after: Desired) -> tuple[tuple[Step, ...], ...]:
    """The steps of each pass from `before`, at rest (None: nothing is there), until `after` is at rest.

    Status and RequeueAfter are left out, and passes without anything else.
    """
    stage = _Stage()
    if before is not None:
        stage.play(before)
    return stage.play(after)


@dataclass
class _Stage:
    """A cluster in which everything works."""

    objects: dict[Ref, dict[str, Any]] = field(default_factory=dict[Ref, "dict[str, Any]"])
    status: Manifest = field(default_factory=dict[str, Any])
    probes: dict[str, ProbeReport] = field(default_factory=dict[str, ProbeReport])
    now: float = 0.0
    version: int = 0

    def play(self, desired: Desired) -> tuple[tuple[Step, ...], ...]:
        passes: list[tuple[Step, ...]] = []
        for _ in range(_MOST_PASSES):
            steps = plan(desired, self._observe(), self.now)
            shown = tuple(step for step in steps if not isinstance(step, Status | RequeueAfter))
            for step in steps:
                self._carry_out(step)
            if not any(isinstance(step, Status) for step in steps) and not shown:
                return tuple(passes)
            passes += [shown] if shown else []
            self._let_pods_follow()
            self.now += 1.0
        raise AssertionError(f"{desired.name} does not come to rest: {passes[-1]}")

    def _observe(self) -> Observed:
        serving = next(self._serving(), None)
        return Observed(
            service={"metadata": {}, "status": self.status},
            objects=dict(self.objects),
            probes=dict(self.probes),
            gateways=(GatewayReport("gateway", serving),) * 64,  # as many as there may be
            gateways_at=self.now,
        )

    def _serving(self) -> Iterator[str]:
        if "servingRevision" in self.status:
            yield self.status["servingRevision"]

    def _carry_out(self, step: Step) -> None:
        match step:
            case Apply(manifest=manifest):
                self._put(manifest)
            case MakeSecret(secret=secret):
                self._put(secret.manifest)
            case Scale(ref=ref, replicas=replicas):
                body = self.objects[ref]
                self._put({**body, "spec": {**body["spec"], "replicas": replicas}})
            case Delete(ref=ref):
                del self.objects[ref]
            case Status(ref=ref, status=status):
                if ref.kind == SERVICE_KIND:
                    self.status = status
                else:
                    self.objects[ref]["status"] = status
            case Probe(revision=revision, is_remote=is_remote):
                self.probes[revision] = ProbeReport(revision, self.now, True, is_remote, "as it should")
            case AskGateways() | LookAtPods() | Event() | RequeueAfter():
                pass

    def _put(self, manifest: Manifest) -> None:
        self.version += 1
        ref = ref_of(manifest)
        old = self.objects.get(ref, {"metadata": {"uid": str(self.version)}, "spec": {}})
        metadata = {**old["metadata"], **manifest["metadata"], "resourceVersion": str(self.version)}
        spec = {**old.get("spec", {}), **manifest.get("spec", {})}
        self.objects[ref] = {**old, **manifest, "metadata": metadata, "spec": spec}

    def _let_pods_follow(self) -> None:
        for ref, body in self.objects.items():
            if ref.kind == "Deployment":
                count = body["spec"].get("replicas", 1)
                body["status"] = {"replicas": count, "readyReplicas": count}


def describe(step: Step) -> str:
    """A step in words, for people."""
    match step:
        case Apply(manifest=manifest, manager=manager) if manager == SEED_MANAGER:
            return _workers(str(ref_of(manifest)), manifest["spec"]["replicas"])
        case Apply(manifest=manifest) if REVISION_LABEL in manifest["metadata"]["labels"]:
            return _workers(manifest["metadata"]["name"], manifest["spec"]["replicas"])
        case Apply(manifest=manifest):
            return f"{'make' if step.is_new else 'change'} {ref_of(manifest)}"
        case MakeSecret(secret=secret):
            return f"make {ref_of(secret.manifest)} with random values"
        case Scale(ref=ref, replicas=replicas):
            return _workers(ref.name, replicas)
        case Delete(ref=ref):
            return f"delete {ref}"
        case Probe(revision=revision, is_remote=is_remote):
            way = "prefill and decode" if is_remote else "decode alone"
            return f"probe revision {revision}: one prompt through {way}"
        case AskGateways(reason=reason):
            return f"ask every gateway: {reason}"
        case LookAtPods(reason=reason):
            return f"look at the pods: {reason}"
        case Event(message=message):
            return message
        case Status(ref=ref):
            return f"tell the status of {ref}"
        case RequeueAfter(seconds=seconds, reason=reason):
            return f"look again in {seconds:g} s: {reason}"


def _workers(name: str, count: int) -> str:
    return f"{name}: {count} worker{'' if count == 1 else 's'}"

"""What the status of an LLMService and its LLMPools says. Pure, standard library only.

Ready means routable: a probe went through a gateway, a prefill and a decode worker. A condition keeps the time of its
last change, and a measurement stays until another revision serves, so that a service at rest is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from baton_operator.objects import (
    COMPONENT_LABEL,
    REVISION_LABEL,
    ROLES,
    SERVICE_LABEL,
    Desired,
    Manifest,
    Observed,
    ProbeReport,
    ref_of,
    status_of,
)
from baton_operator.rollout import Facts, Rollout


@dataclass(frozen=True, slots=True)
class Verdict:
    """One condition: what it says and why."""

    type: str
    status: bool | None  # None: Unknown
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a status is made of."""

    desired: Desired
    observed: Observed
    facts: Facts
    rollout: Rollout
    draining: tuple[str, ...]  # revisions that are on their way out
    held: str | None  # the one of them that requests still go to
    refused: tuple[str, ...]  # objects that could not be made, each with why


_RETRY = "Apply a mended spec; this one is tried again only after another one (the former one will do)"


_WHOLE = {
    "PrefillReady": "True", "DecodeReady": "True", "GatewayReady": "True", "Progressing": "False", "Degraded": "False",
}  # fmt: skip


def service_status(situation: Situation, now: float) -> dict[str, Any]:
    desired, facts, rollout = situation.desired, situation.facts, situation.rollout
    old = status_of(situation.observed.service)
    pools = {role: _pool_counts(facts, rollout.serving, role) for role in ROLES}
    return {
        "observedGeneration": desired.generation,
        "model": desired.model,
        "url": desired.url,
        "mode": desired.mode,
        "revision": desired.revision,
        "servingRevision": rollout.serving,
        "pools": pools,
        "conditions": [
            _condition(verdict, old, desired.generation, now, is_measured=_is_measured(verdict, old, rollout))
            for verdict in judge(situation, old)
        ],
    }


def pool_status(situation: Situation, role: str) -> dict[str, Any]:
    """The selector is of the serving revision alone: an HPA must not average over workers without requests."""
    serving = situation.rollout.serving
    workers = situation.facts.of(serving, role)
    labels = {SERVICE_LABEL: situation.desired.name, COMPONENT_LABEL: role, REVISION_LABEL: serving}
    return {
        "replicas": workers.current if workers else 0,
        "readyReplicas": workers.ready if workers else 0,
        "selector": ",".join(f"{key}={value}" for key, value in labels.items()),
    }


def invalid_status(service: Manifest, message: str, now: float) -> dict[str, Any]:
    """Of an LLMService whose spec this operator cannot read: it changes nothing, and says no more of the rest."""
    old, generation = status_of(service), service["metadata"]["generation"]
    verdicts = (Verdict("Ready", False, "InvalidSpec", message), Verdict("Degraded", True, "InvalidSpec", message))
    return {**old, "conditions": [_condition(verdict, old, generation, now) for verdict in verdicts]}


def missing_since(service: Manifest) -> float | None:
    """When the status came to say that something is missing, or that something more is; None: it says no such thing."""
    said = [_found(status_of(service), kind) for kind in _WHOLE]
    changes = [found for found in said if found is not None and found["status"] != _WHOLE[found["type"]]]
    return max((datetime.fromisoformat(found["lastTransitionTime"]).timestamp() for found in changes), default=None)


def judge(situation: Situation, old: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Every condition, Ready first."""
    parts = (*(_pool_ready(situation, role) for role in ROLES), _gateway_ready(situation))
    transfer = _transfer_ready(situation, old)
    return (_ready(situation, parts, old), *parts, transfer, _progressing(situation), _degraded(situation))


# ---------------------------------------------------------------- conditions


def _pool_ready(situation: Situation, role: str) -> Verdict:
    size, ready = situation.facts.sizes[role], situation.facts.ready(situation.rollout.serving, role)
    kind, words = f"{role.capitalize()}Ready", f"{ready} of {size} {role} workers ready"
    if size == 0:
        return Verdict(kind, True, "NoneWanted", f"no {role} worker is wanted")
    if ready < size:
        words += situation.facts.why(situation.rollout.serving, role)
    if ready == 0:
        return Verdict(kind, False, "NoneReady", words)
    return Verdict(kind, True, "AllReady" if ready >= size else "SomeReady", words)


def _gateway_ready(situation: Situation) -> Verdict:
    wanted, ready = int(situation.desired.gateway["spec"]["replicas"]), situation.facts.num_ready_gateways
    words = f"{ready} of {wanted} gateways ready"
    if ready < wanted:
        words += situation.facts.why("", "gateway")
    if ready == 0:
        return Verdict("GatewayReady", False, "NoneReady", words)
    live = situation.observed.objects.get(ref_of(situation.desired.gateway))
    more = int(status_of(live).get("replicas", 0)) - wanted
    if more > 0:  # a new one that cannot use the workers stays so, and the old one goes on
        return Verdict("GatewayReady", True, "Changing", f"{words}, {more} more until new ones have replaced old ones")
    return Verdict("GatewayReady", True, "AllReady" if ready >= wanted else "SomeReady", words)


def _transfer_ready(situation: Situation, old: Mapping[str, Any]) -> Verdict:
    probe = _serving_probe(situation)
    if situation.desired.mode == "Never" or not situation.facts.sizes["prefill"]:
        return Verdict("TransferReady", None, "NotDisaggregated", "no prompt is handed over between workers")
    if probe is None or not probe.is_remote:
        return _kept(old, "TransferReady") or Verdict("TransferReady", None, "NotProbed", "no hand-over was tried yet")
    if probe.is_ok:
        return Verdict("TransferReady", True, "Probed", probe.message)
    return Verdict("TransferReady", False, "ProbeFailed", probe.message)


def _ready(situation: Situation, parts: tuple[Verdict, ...], old: Mapping[str, Any]) -> Verdict:
    missing = [part for part in parts if part.status is not True]
    if missing:
        return Verdict("Ready", False, _trouble(situation) or "NotUp", "; ".join(part.message for part in missing))
    probe = _serving_probe(situation)
    if probe is None:
        return _kept(old, "Ready") or Verdict(
            "Ready", False, "NotProbed", "workers and gateways are up, not yet probed"
        )
    if not probe.is_ok:
        return Verdict("Ready", False, "ProbeFailed", probe.message)
    return Verdict("Ready", True, "Routable", f"revision {probe.revision} answered a probe through the gateway")


def _progressing(situation: Situation) -> Verdict:
    rollout, facts = situation.rollout, situation.facts
    if rollout.candidate:
        seen = ", ".join(
            f"{facts.ready(rollout.candidate, role)} {role} workers ready{facts.why(rollout.candidate, role)}"
            for role in ROLES
        )
        words = f"revision {rollout.candidate} is on trial beside {rollout.serving}: {seen}"
        if facts.num_ready_gateways == 0:
            words += ", no gateway is ready to probe it"
        return Verdict("Progressing", True, "Trial", words)
    if situation.draining:
        words = f"revision {', '.join(situation.draining)} is on its way out"
        if situation.held:
            words += f"; {situation.held} stays while requests go to it: they can not yet go to {rollout.serving}"
        return Verdict("Progressing", True, "Draining", words)
    if not facts.is_up(rollout.serving, facts.sizes):
        return Verdict("Progressing", True, "WaitingForWorkers", f"revision {rollout.serving} gets its workers")
    return Verdict("Progressing", False, "AtRest", f"revision {rollout.serving} has all its workers")


def _degraded(situation: Situation) -> Verdict:
    rollout, desired, facts = situation.rollout, situation.desired, situation.facts
    if situation.refused:
        return Verdict("Degraded", True, "Refused", "; ".join(situation.refused))
    if rollout.failed == desired.revision:
        words = f"revision {rollout.failed} was rolled back, {rollout.serving} serves: {rollout.failure}. {_RETRY}"
        return Verdict("Degraded", True, "RolledBack", words)
    if any(not report.is_registry_connected for report in situation.observed.gateways):
        words = f"gateways route by what they knew last, and by DNS{facts.why('', 'redis')}"
        return Verdict("Degraded", True, "RegistryLost", words)
    if desired.warnings:
        return Verdict("Degraded", False, "Warnings", "; ".join(desired.warnings))
    return Verdict("Degraded", False, "AsExpected", "nothing is wrong")


# ---------------------------------------------------------------- parts


def _serving_probe(situation: Situation) -> ProbeReport | None:
    return situation.facts.probes.get(situation.rollout.serving)


def _trouble(situation: Situation) -> str | None:
    """The reason that the first part which is missing gives: what `kubectl get llm` shows."""
    serving = situation.rollout.serving
    wheres = ((serving, "prefill"), (serving, "decode"), ("", "gateway"))
    return next((found.reason for where in wheres if (found := situation.facts.troubles.get(where))), None)


def _pool_counts(facts: Facts, serving: str, role: str) -> dict[str, Any]:
    size, ready = facts.sizes[role], facts.ready(serving, role)
    return {"replicas": size, "readyReplicas": ready, "summary": f"{ready}/{size}"}


def _kept(old: Mapping[str, Any], kind: str) -> Verdict | None:
    """What was said before the operator was started anew, if it was good: a restart is no news."""
    found = _found(old, kind)
    return Verdict(kind, True, found["reason"], found["message"]) if found and found.get("status") == "True" else None


def _is_measured(verdict: Verdict, old: Mapping[str, Any], rollout: Rollout) -> bool:
    """Whether the message has numbers in it, which differ with every probe of the same revision."""
    return verdict.reason == "Probed" and old.get("servingRevision") == rollout.serving


def _condition(
    verdict: Verdict, old: Mapping[str, Any], generation: int, now: float, *, is_measured: bool = False
) -> dict[str, Any]:
    status = {True: "True", False: "False", None: "Unknown"}[verdict.status]
    before = _found(old, verdict.type)
    is_same = before is not None and before.get("status") == status
    return {
        "type": verdict.type,
        "status": status,
        "observedGeneration": generation,
        "lastTransitionTime": before["lastTransitionTime"] if before and is_same else _rfc3339(now),
        "reason": verdict.reason,
        "message": before["message"] if before and is_same and is_measured else verdict.message[:1024],
    }


def _found(old: Mapping[str, Any], kind: str) -> Manifest | None:
    conditions = cast("list[Manifest]", old.get("conditions") or [])
    return next((condition for condition in conditions if condition.get("type") == kind), None)


def _rfc3339(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""Which revision serves, which one is on trial, and how many workers each may have. Pure, standard library only.

    serving A, asked for B:   B on trial beside A -> B answers a probe -> B serves, A drains -> A is gone
                                                 `-> no answer by the deadline -> B failed: 0 workers, A goes on
    serving A, A has no pair: nothing to protect: B serves at once (the very first rollout is of this kind)
    serving A, B failed but gateways live on it since A has no pair, asked for C: B serves, C on trial beside it

A failed revision is tried again only after another one was asked for. At most one revision is on trial, and it gets
workers only as older ones go: never more than twice a pool (Surge) or the pool itself (Replace) at any time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

from baton_operator.objects import (
    REVISION_LABEL,
    ROLES,
    Desired,
    Manifest,
    Observed,
    ProbeReport,
    Ref,
    Trouble,
    Where,
    is_owned,
    ref_of,
    status_of,
)

ROUTING_FILE = "routing.json"  # what gateways read
ROLLOUT_FILE = "rollout.json"  # what only the operator reads


@dataclass(frozen=True, slots=True)
class Rollout:
    """The memory of rollouts, kept in the ConfigMap `<name>-routing`."""

    serving: str
    is_proven: bool = False  # the serving revision has answered a probe since it serves, or to become the serving one
    candidate: str | None = None
    since: float = 0.0  # the last change of serving or candidate
    failed: str | None = None
    failure: str = ""

    def data(self) -> dict[str, str]:
        """The ConfigMap's data."""
        memory = {
            "proven": self.is_proven,
            "candidate": self.candidate,
            "since": datetime.fromtimestamp(self.since, UTC).isoformat(timespec="milliseconds"),
            "failed": self.failed,
            "failure": self.failure,
        }
        files = {ROUTING_FILE: {"servingRevision": self.serving}, ROLLOUT_FILE: memory}
        return {name: json.dumps(value, sort_keys=True) for name, value in files.items()}


@dataclass(frozen=True, slots=True)
class Workers:
    """One worker Deployment as it was seen."""

    ref: Ref
    wanted: int  # spec.replicas
    current: int
    ready: int
    uid: str
    resource_version: str
    is_settled: bool  # the Deployment controller has seen the spec that we see

    @property
    def most(self) -> int:
        """How many pods there may be now or in a moment."""
        return max(self.wanted, self.current)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a decision about rollouts needs, out of what was observed."""

    workers: Mapping[tuple[str, str], Workers]  # by revision, role
    sizes: Mapping[str, int]  # how many workers each role should have
    probes: Mapping[str, ProbeReport]
    num_ready_gateways: int
    troubles: Mapping[Where, Trouble] = field(default_factory=dict[Where, Trouble])  # of pods, as last looked at

    def of(self, revision: str | None, role: str) -> Workers | None:
        return self.workers.get((revision, role)) if revision else None

    @property
    def revisions(self) -> set[str]:
        return {revision for revision, _ in self.workers}

    def has_pair(self, revision: str) -> bool:
        """Whether a request can be served: one ready worker of each role that should have any."""
        return all(self.ready(revision, role) > 0 for role in ROLES if self.sizes[role])

    def exists(self, revision: str) -> bool:
        return all((revision, role) in self.workers for role in ROLES if self.sizes[role])

    def is_up(self, revision: str, sizes: Mapping[str, int]) -> bool:
        """Whether it exists with all its workers ready, and no pod is still to come or to go."""
        found = [(self.of(revision, role), sizes[role]) for role in ROLES]
        return all(workers is not None and workers.is_settled and workers.ready >= size for workers, size in found)

    def why(self, revision: str, component: str) -> str:
        """Why some are missing, to be added to how many are; empty where no pod said."""
        trouble = self.troubles.get((revision, component))
        return f" ({trouble})" if trouble is not None else ""

    def ready(self, revision: str, role: str) -> int:
        workers = self.of(revision, role)
        return workers.ready if workers is not None else 0


def gather_facts(desired: Desired, observed: Observed) -> Facts:
    workers: dict[tuple[str, str], Workers] = {}
    for ref, body in observed.objects.items():
        labels = body["metadata"].get("labels", {})
        if ref.kind != "Deployment" or REVISION_LABEL not in labels or not is_owned(body, desired.uid):
            continue
        role = labels.get("app.kubernetes.io/component")
        if role in ROLES and not body["metadata"].get("deletionTimestamp"):
            workers[labels[REVISION_LABEL], role] = _workers(ref, body)
    sizes = {role: _size(desired, observed, role) for role in ROLES}
    num_ready_gateways = int(status_of(observed.objects.get(ref_of(desired.gateway))).get("readyReplicas", 0))
    return Facts(workers, sizes, observed.probes, num_ready_gateways, observed.troubles)


def read_rollout(config_map: Manifest | None, desired: Desired, observed: Observed, facts: Facts) -> Rollout | None:
    """What the ConfigMap says. Where it is lost or spoilt, what status said; None where nothing was ever served."""
    data = cast("Mapping[str, str]", (config_map or {}).get("data") or {})
    serving = _parsed(data.get(ROUTING_FILE)).get("servingRevision")
    if not isinstance(serving, str) or not serving:
        said = status_of(observed.service).get("servingRevision")
        return Rollout(str(said)) if said and facts.exists(str(said)) else None
    memory = _parsed(data.get(ROLLOUT_FILE))
    candidate, failed = memory.get("candidate"), memory.get("failed")
    return Rollout(
        serving=serving,
        is_proven=memory.get("proven") is True,
        candidate=candidate if isinstance(candidate, str) else None,
        since=_timestamp(memory.get("since")),
        failed=failed if isinstance(failed, str) else None,
        failure=str(memory.get("failure") or ""),
    )


def advance(rollout: Rollout | None, desired: Desired, facts: Facts, now: float, routed: Sequence[str] = ()) -> Rollout:
    """The next state. Every transition of a rollout is here. `routed`: where each gateway would send a request now."""
    target = desired.revision
    if rollout is None:
        return Rollout(target, since=now)
    if rollout.serving == target:
        probe = facts.probes.get(target)
        is_proven = rollout.is_proven or (probe is not None and probe.is_ok)
        since = now if rollout.candidate else rollout.since
        return replace(rollout, is_proven=is_proven, candidate=None, since=since, failed=None, failure="")
    if not facts.exists(rollout.serving) or not (rollout.is_proven or facts.has_pair(rollout.serving)):
        return Rollout(target, since=now)  # nothing to protect
    if rollout.failed == target:
        return replace(rollout, candidate=None)
    other = _stand_in(rollout, facts, routed)
    if other is not None and other != target:
        return Rollout(other, candidate=target, since=now)  # else target has no room until the serving one is back
    if rollout.candidate != target:
        return replace(rollout, candidate=target, since=now, failed=None, failure="")
    return _judge(rollout, desired, facts, now)


def _stand_in(rollout: Rollout, facts: Facts, routed: Sequence[str]) -> str | None:
    """The revision that serves in truth: every gateway lives on it, and the one that should serve has no pair."""
    (only, *others) = set(routed) or {None}
    if only is None or others or only not in leaving_revisions(rollout, facts):
        return None
    is_wanted = all(workers.wanted > 0 for role in ROLES if (workers := facts.of(only, role)) and facts.sizes[role])
    return only if is_wanted and facts.has_pair(only) and not facts.has_pair(rollout.serving) else None


def _judge(rollout: Rollout, desired: Desired, facts: Facts, now: float) -> Rollout:
    """A revision on trial: it serves, fails or goes on being tried."""
    target = desired.revision
    is_up = facts.is_up(target, trial_sizes(desired, facts))
    probe = trial_probe(rollout, facts)
    if is_up and probe is not None and probe.is_ok:
        return Rollout(target, is_proven=True, since=now)
    is_late = now - rollout.since > desired.progress_deadline_s
    can_ask = is_up and probe is None and facts.num_ready_gateways > 0
    if is_late and not can_ask:  # an operator that was away asks before it judges
        why = _what_failed(target, probe, desired, facts) if is_up else _missing(target, desired, facts)
        failure = f"no answer in {desired.progress_deadline_s:g} s: {why}"
        return replace(rollout, candidate=None, since=now, failed=target, failure=failure)
    return rollout


def trial_probe(rollout: Rollout, facts: Facts) -> ProbeReport | None:
    """The last probe of the candidate since its trial began."""
    probe = facts.probes.get(rollout.candidate or "")
    return probe if probe is not None and probe.at >= rollout.since else None


def trial_sizes(desired: Desired, facts: Facts) -> dict[str, int]:
    """How many workers a revision on trial must have to be judged."""
    return {role: size - (_kept(size) if desired.replaces else 0) for role, size in facts.sizes.items()}


def worker_counts(rollout: Rollout, desired: Desired, facts: Facts) -> dict[tuple[str, str], int]:
    """Replicas of each worker Deployment that is to exist, by revision and role.

    Revisions that neither serve nor are on trial are not in it: they drain (plan.py asks the gateways first). So does
    one that failed, but its Deployments stay.
    """
    counts: dict[tuple[str, str], int] = {}
    for role, size in facts.sizes.items():
        room = size if desired.replaces else 2 * size
        held = {revision: found.most for (revision, of), found in facts.workers.items() if of == role}
        serving, trial = rollout.serving, rollout.candidate
        others = sum(most for revision, most in held.items() if revision != serving)
        wanted = _kept(size) if trial is not None and desired.replaces else size
        # What it has it keeps: only growth waits for others to go.
        counts[serving, role] = min(wanted, max(held.get(serving, 0), room - others, 0))
        if trial is not None:
            held[serving] = max(held.get(serving, 0), counts[serving, role])  # it may grow in this pass
            left = room - sum(most for revision, most in held.items() if revision != trial)
            counts[trial, role] = max(0, min(trial_sizes(desired, facts)[role], left))
    return counts


def leaving_revisions(rollout: Rollout, facts: Facts) -> set[str]:
    """Revisions that have something left and should not; of one that failed, Deployments without workers may stay."""
    others = facts.revisions - {rollout.serving, rollout.candidate}
    return {
        revision
        for (revision, _), workers in facts.workers.items()
        if revision in others and (revision != rollout.failed or workers.most > 0)
    }


def held_revision(rollout: Rollout, facts: Facts, routed: Sequence[str]) -> str | None:
    """The leaving revision that may not go yet. `routed`: where each gateway would send a request now.

    Gateways rather use any complete revision than none: one that was given up and came up late serves while the serving
    one has no pair. At most one is held, that of most gateways, so that there is room for the serving one.
    """
    leaving = leaving_revisions(rollout, facts)
    votes = Counter(revision for revision in routed if revision in leaving)
    if not facts.has_pair(rollout.serving):  # what the gateways said may be older than what we see
        votes.update(revision for revision in leaving if facts.has_pair(revision))
    return max(votes, key=lambda revision: (votes[revision], revision), default=None)


def held_count(workers: Workers, desired: Desired, facts: Facts, role: str) -> int:
    """What a held revision keeps: no more than leaves room for the serving one, as if that were on trial."""
    size = facts.sizes[role]
    return min(workers.wanted, _kept(size) if desired.replaces else size)


# ---------------------------------------------------------------- parts


def _kept(size: int) -> int:
    """Old workers that Replace keeps until the new revision serves: a pool of one has none to spare."""
    return 1 if size >= 2 else 0


def _what_failed(revision: str, probe: ProbeReport | None, desired: Desired, facts: Facts) -> str:
    """Of a revision that is up."""
    if probe is not None:
        return f"the probe failed: {probe.message}"
    return f"its workers are ready, but no gateway is, so nothing could probe it; see Deployment/{_gateway(desired)}"


def _gateway(desired: Desired) -> str:
    return str(desired.gateway["metadata"]["name"])


def _missing(revision: str, desired: Desired, facts: Facts) -> str:
    sizes = trial_sizes(desired, facts)
    found = {role: facts.of(revision, role) for role in ROLES}
    return ", ".join(
        f"{workers.ready if workers else 0} of {sizes[role]} {role} workers ready{facts.why(revision, role)}"
        for role, workers in found.items()
    )


def _size(desired: Desired, observed: Observed, role: str) -> int:
    """What the pool's LLMPool says, or what it is about to say."""
    pool = desired.pools[role]
    if pool.replicas is not None:
        return pool.replicas
    live = observed.objects.get(Ref(pool.pool["apiVersion"], pool.pool["kind"], pool.pool["metadata"]["name"]))
    asked = (live or {}).get("spec", {}).get("replicas")
    return pool.clamp(pool.seed if asked is None else int(asked))


def _workers(ref: Ref, body: Manifest) -> Workers:
    metadata, status = body["metadata"], status_of(body)
    return Workers(
        ref=ref,
        wanted=int(body["spec"].get("replicas", 1)),
        current=int(status.get("replicas", 0)),
        ready=int(status.get("readyReplicas", 0)),
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        is_settled=int(status.get("observedGeneration", 0)) >= int(metadata.get("generation", 0)),
    )


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        value: object = json.loads(text or "{}")
    except ValueError:
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _timestamp(text: object) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0

"""Decide what to do next for one LLMService: observed + desired + now -> steps. Pure, standard library only.

`plan` is level-triggered: it looks at what is there and says everything that may be done now, in order. Carrying out
any prefix of its steps, or the same steps twice, and planning again ends in the same state. A plan of nothing but
`RequeueAfter` (or of nothing) writes nothing.

A rollout keeps its memory in one object, the ConfigMap `<name>-routing`: `routing.json` says which revision serves
(the gateways read it), `rollout.json` whether that revision ever answered a probe, which candidate is on trial since
when, and which one failed, `gateway.json` how the gateways of the serving revision are started. It is written with the
resourceVersion that was read, so a stale view cannot move it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from baton_operator.drift import differs, stamped
from baton_operator.gateway_start import GATEWAY_FILE, read_start, start_of
from baton_operator.objects import (
    API_VERSION,
    FIELD_MANAGER,
    HASH_ANNOTATION,
    SEED_MANAGER,
    SERVICE_KIND,
    Desired,
    DesiredPool,
    Manifest,
    Observed,
    ProbeReport,
    RandomSecret,
    Ref,
    is_owned,
    ref_of,
    status_of,
)
from baton_operator.rollout import (
    Rollout,
    Workers,
    advance,
    gather_facts,
    held_count,
    held_revision,
    leaving_revisions,
    read_rollout,
    trial_probe,
    trial_sizes,
    worker_counts,
)
from baton_operator.status import Situation, missing_since, pool_status, service_status


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply with force.

    The manifest carries its HASH_ANNOTATION. `is_new`: no such object was seen, so look first (one live GET): an object
    of that name that this service does not control is refused (StepFailure), not taken over. A refused step does not
    end the pass: Status comes last and tells of it. Where the manifest has
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
    """Set spec.replicas alone, by merge patch: of a Deployment whose pods are not to become those of the desired spec.

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
class LookAtPods:
    """List the service's pods; keep what they wait for in vain (pods.troubles_of) and plan again."""

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


Step: TypeAlias = Apply | MakeSecret | Scale | Delete | Probe | AskGateways | LookAtPods | Event | Status | RequeueAfter
"""In order. Everything but Probe, AskGateways, LookAtPods, Event and RequeueAfter mutates."""


PROBE_RETRY_S = 5.0
PROBE_INTERVAL_S = 120.0  # of a service at rest
ASK_INTERVAL_S = 2.0  # while gateways take up a new serving revision; kubelets bring it to them within a minute or so
TAKEN_RETRY_S = 10.0
LOOK_AFTER_S = 5.0  # pods that start as they should are not looked at
LOOK_INTERVAL_S = 300.0  # at the most: of pods that have been missing for long


def plan(desired: Desired, observed: Observed, now: float) -> tuple[Step, ...]:
    """What to do now. `now` is wall-clock seconds: the rollout's start is kept in the cluster."""
    if observed.service["metadata"].get("deletionTimestamp"):
        return ()  # the garbage collector has the rest
    return _Planner(desired, observed, now).plan()


class _Planner:
    """One pass. Steps are collected in the order in which they are carried out."""

    def __init__(self, desired: Desired, observed: Observed, now: float) -> None:
        self.desired = desired
        self.observed = observed
        self.now = now
        self.facts = gather_facts(desired, observed)
        self.routing = observed.objects.get(ref_of(desired.routing))
        is_readable = self.routing is not None and is_owned(self.routing, desired.uid)
        routing = self.routing if is_readable else None
        self.before = read_rollout(routing, desired, observed, self.facts)
        routed = [report.routed_revision for report in observed.gateways if report.routed_revision is not None]
        self.rollout = advance(self.before, desired, self.facts, now, routed)
        is_settled = self.rollout.serving == desired.revision
        self.start = start_of(desired.gateway) if is_settled else read_start(routing)
        self.counts = worker_counts(self.rollout, desired, self.facts)
        self.leaving = sorted(leaving_revisions(self.rollout, self.facts))
        self.held = held_revision(self.rollout, self.facts, routed)
        self.steps: list[Step] = []
        self.refused = [f"{failure.ref}: {failure.message}" for failure in observed.failures]
        self.wakes: list[RequeueAfter] = []

    def plan(self) -> tuple[Step, ...]:
        self._make_secrets()
        for manifest in self.desired.before:
            self._apply(manifest)
        self._keep_pools()
        self._keep_routing()
        self._shrink_workers()
        self._let_go()
        self._grow_workers()
        self._keep_gateways()
        for manifest in self.desired.after:
            self._apply(manifest)
        self._prune()
        self._ask()
        self._look_at_pods()
        self._tell()
        return (*self.steps, *sorted(self.wakes, key=lambda wake: wake.seconds)[:1])

    # ------------------------------------------------------------ objects

    def _make_secrets(self) -> None:
        for secret in self.desired.secrets:
            live = self.observed.objects.get(ref_of(secret.manifest))
            if live is None:
                self.steps.append(MakeSecret(secret, "missing"))
            else:
                self._is_ours(ref_of(secret.manifest), live)

    def _apply(self, manifest: Manifest, *, resource_version: str | None = None) -> bool:
        """Apply unless it is there and the same; whether there is something to do."""
        ref, wanted = ref_of(manifest), stamped(manifest)
        live = self.observed.objects.get(ref)
        if live is None:
            self.steps.append(Apply(wanted, "missing", is_new=True))
            return True
        if not self._is_ours(ref, live) or not differs(wanted, live):
            return False
        was = live["metadata"].get("annotations", {}).get(HASH_ANNOTATION)
        is_changed = was != wanted["metadata"]["annotations"][HASH_ANNOTATION]
        if resource_version is not None:
            wanted["metadata"]["resourceVersion"] = resource_version
        self.steps.append(Apply(wanted, "changed" if is_changed else "edited by somebody else"))
        return True

    def _is_ours(self, ref: Ref, live: Manifest) -> bool:
        """Whether the object may be changed: it is this service's and is not being deleted."""
        if not is_owned(live, self.desired.uid):
            words = f"{ref}: there is one that this service does not own; delete it or rename the service"
            self.refused += [words] if words not in self.refused else []
            self.wakes.append(RequeueAfter(TAKEN_RETRY_S, f"{ref} is taken"))
            return False
        return not live["metadata"].get("deletionTimestamp")

    def _keep_pools(self) -> None:
        """Replicas of a pool have one writer. Who scales a pool that the service leaves open is never written over."""
        for pool in self.desired.pools.values():
            ref = ref_of(pool.pool)
            live = self.observed.objects.get(ref)
            if pool.replicas is not None:
                self._apply({**pool.pool, "spec": {**pool.pool["spec"], "replicas": pool.replicas}})
                continue
            asked = live["spec"].get("replicas") if live is not None else None
            if asked is not None and live is not None and _owns_replicas(live):
                self._seed(pool, asked, "let go of replicas")  # first: a field that nobody owns any more is removed
            self._apply(pool.pool)
            if asked is None:
                self._seed(pool, pool.seed, "nobody has scaled it yet")

    def _seed(self, pool: DesiredPool, replicas: int, reason: str) -> None:
        metadata = {key: pool.pool["metadata"][key] for key in ("name", "namespace")}
        manifest = {**pool.pool, "metadata": metadata, "spec": {"replicas": replicas}}
        live = self.observed.objects.get(ref_of(pool.pool))
        if live is None or self._is_ours(ref_of(pool.pool), live):
            self.steps.append(Apply(manifest, reason, is_new=live is None, manager=SEED_MANAGER))

    def _keep_routing(self) -> None:
        version = self.routing["metadata"]["resourceVersion"] if self.routing is not None else None
        data = self.rollout.data() | ({GATEWAY_FILE: self.start.text()} if self.start else {})
        if self._apply({**self.desired.routing, "data": data}, resource_version=version):
            self.steps.extend(_rollout_events(self.before, self.rollout))

    def _keep_gateways(self) -> None:
        """Another image waits until the revision that it came with serves: it may not speak with the one before.

        Gateways and workers speak exactly one version of the protocol. So the gateways that are there judge whether
        they can use the new workers, and where they cannot, the trial ends as if nothing had been asked for.
        """
        wanted = self.desired.gateway
        live = self.observed.objects.get(ref_of(wanted))
        if self.rollout.serving == self.desired.revision:
            self._apply(wanted)
            return
        if live is None:  # somebody deleted them
            self._apply(self.start.put_into(wanted) if self.start else wanted)
            return
        if start_of(live).image == start_of(wanted).image:
            self._apply(wanted)
            return
        replicas = wanted["spec"]["replicas"]
        if self._is_ours(ref_of(wanted), live) and live["spec"].get("replicas") != replicas:
            metadata, words = live["metadata"], f"{replicas} gateways are asked for"
            self.steps.append(Scale(ref_of(wanted), replicas, metadata["uid"], metadata["resourceVersion"], words))

    # ------------------------------------------------------------ workers

    def _shrink_workers(self) -> None:
        """Fewer workers first: what they free, others get in a later pass."""
        self._set_workers(lambda workers, count: workers is not None and count < workers.wanted)

    def _grow_workers(self) -> None:
        self._set_workers(lambda workers, count: workers is None or count >= workers.wanted)

    def _set_workers(self, is_due: Callable[[Workers | None, int], bool]) -> None:
        for (revision, role), count in sorted(self.counts.items()):
            workers = self.facts.of(revision, role)
            if not is_due(workers, count):
                continue
            if revision == self.desired.revision:
                manifest = self.desired.pools[role].deployment
                self._apply({**manifest, "spec": {**manifest["spec"], "replicas": count}})
            elif workers is not None and workers.wanted != count:
                self.steps.append(_scale(workers, count, f"revision {revision} should have {count}"))

    def _let_go(self) -> None:
        """Revisions that neither serve nor are on trial: none may leave while a gateway may still send to it."""
        if not self.leaving:
            return
        is_followed = self._all_gateways_follow()
        if not is_followed or self.held:
            words = f"gateways should serve {self.rollout.serving} before {self.held or ', '.join(self.leaving)} may go"
            self._ask_gateways(words)
            self.wakes.append(RequeueAfter(ASK_INTERVAL_S, words))
        if not is_followed:
            return
        for (revision, role), workers in sorted(self.facts.workers.items()):
            if revision not in self.leaving:
                continue
            count = held_count(workers, self.desired, self.facts, role) if revision == self.held else 0
            if workers.wanted > count:
                self.steps.append(_scale(workers, count, f"revision {revision} drains"))
            elif workers.most == 0 and workers.is_settled and revision not in (self.held, self.rollout.failed):
                words = f"revision {revision} has drained"
                self.steps.append(Delete(workers.ref, workers.uid, workers.resource_version, words))

    def _all_gateways_follow(self) -> bool:
        """Whether every ready gateway said, since the last change, that it serves what it should."""
        ready = self.facts.num_ready_gateways
        if ready == 0:
            return True  # nobody sends anything
        if self.observed.gateways_at < self.rollout.since:
            return False
        serving = [report.serving_revision for report in self.observed.gateways if report.serving_revision is not None]
        return len(serving) >= ready and all(revision == self.rollout.serving for revision in serving)

    def _prune(self) -> None:
        """What was desired once. Only at rest: workers of an older revision may still mount or reach it."""
        if self.leaving or self.rollout.serving != self.desired.revision:
            return
        wanted = {ref_of(manifest) for manifest in self.desired.manifests}
        wanted |= {ref_of(secret.manifest) for secret in self.desired.secrets}
        workers = {found.ref for found in self.facts.workers.values()}
        for ref, live in sorted(self.observed.objects.items()):
            metadata = live["metadata"]
            if ref in wanted | workers or not is_owned(live, self.desired.uid) or metadata.get("deletionTimestamp"):
                continue
            self.steps.append(Delete(ref, metadata["uid"], metadata["resourceVersion"], "no longer asked for"))

    # ------------------------------------------------------------ probes

    def _ask(self) -> None:
        """Probe what is on trial, else what serves; wake up in time for the next one and for the deadline."""
        rollout, facts = self.rollout, self.facts
        if rollout.candidate is not None:
            left = rollout.since + self.desired.progress_deadline_s - self.now
            self.wakes.append(RequeueAfter(max(left, PROBE_RETRY_S), f"deadline of revision {rollout.candidate}"))
        if facts.num_ready_gateways == 0:
            return
        if rollout.candidate is not None and facts.is_up(rollout.candidate, trial_sizes(self.desired, facts)):
            self._probe(rollout.candidate, trial_probe(rollout, facts), "on trial")
        elif facts.has_pair(rollout.serving):
            self._probe(rollout.serving, facts.probes.get(rollout.serving), "is it routable?")

    def _probe(self, revision: str, last: ProbeReport | None, reason: str) -> None:
        interval = PROBE_INTERVAL_S if last is not None and last.is_ok else PROBE_RETRY_S
        wait = 0.0 if last is None else last.at + interval - self.now
        if 0 < wait <= interval:  # more than that: the clock was set back
            self.wakes.append(RequeueAfter(wait, f"next probe of revision {revision}"))
            return
        is_remote = self.desired.mode != "Never" and self.facts.sizes["prefill"] > 0
        self.steps.append(Probe(revision, is_remote, reason))
        self._ask_gateways("do they reach their registry?")
        self.wakes.append(RequeueAfter(interval, f"next probe of revision {revision}"))

    def _ask_gateways(self, reason: str) -> None:
        if not any(isinstance(step, AskGateways) for step in self.steps):
            self.steps.append(AskGateways(reason))

    def _look_at_pods(self) -> None:
        """While some are missing: soon after that began, then ever more seldom."""
        if not self._lacks_pods():
            return
        since = max(self.rollout.since, missing_since(self.observed.service) or self.now)
        last = max(self.observed.pods_at, since)
        interval = min(LOOK_INTERVAL_S, max(LOOK_AFTER_S, (last - since) / 4))
        wait = last + interval - self.now
        words = "why do pods not start?"
        if 0 < wait <= interval:
            self.wakes.append(RequeueAfter(wait, words))
            return
        self.steps.append(LookAtPods(words))
        self.wakes.append(RequeueAfter(interval, words))

    def _lacks_pods(self) -> bool:
        facts, trial = self.facts, self.rollout.candidate
        if not facts.is_up(self.rollout.serving, facts.sizes):
            return True
        if trial is not None and not facts.is_up(trial, trial_sizes(self.desired, facts)):
            return True
        if facts.num_ready_gateways < int(self.desired.gateway["spec"]["replicas"]):
            return True
        return any(not report.is_registry_connected for report in self.observed.gateways)  # Redis may be missing

    # ------------------------------------------------------------ status

    def _tell(self) -> None:
        situation = Situation(
            self.desired, self.observed, self.facts, self.rollout, tuple(self.leaving), self.held, tuple(self.refused)
        )
        for role, pool in self.desired.pools.items():
            ref = ref_of(pool.pool)
            live = self.observed.objects.get(ref)
            status = pool_status(situation, role)
            if live is not None and is_owned(live, self.desired.uid) and status_of(live) != status:
                self.steps.append(Status(ref, status))
        old, new = status_of(self.observed.service), service_status(situation, self.now)
        if old != new:
            self.steps.append(Status(Ref(API_VERSION, SERVICE_KIND, self.desired.name), new))
            self.steps.extend(_condition_events(old, new))


# ---------------------------------------------------------------- parts


def _scale(workers: Workers, replicas: int, reason: str) -> Scale:
    return Scale(workers.ref, replicas, workers.uid, workers.resource_version, reason)


def _owns_replicas(live: Manifest) -> bool:
    """Whether our own apply states spec.replicas of the pool."""
    for entry in live["metadata"].get("managedFields", ()):
        if entry.get("manager") == FIELD_MANAGER and "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {}):
            return True
    return False


def _rollout_events(before: Rollout | None, after: Rollout) -> Iterator[Event]:
    if before is None:
        yield Event("Normal", "FirstRevision", f"revision {after.serving} is the first one")
        return
    if after.candidate not in (None, before.candidate):
        yield Event("Normal", "TrialStarted", f"revision {after.candidate} is on trial beside {after.serving}")
    if after.serving != before.serving:
        yield Event("Normal", "RevisionServes", f"requests go to revision {after.serving}, {before.serving} drains")
    if after.failed not in (None, before.failed):
        yield Event("Warning", "RolledBack", f"revision {after.failed} was rolled back: {after.failure}")


def _condition_events(old: Manifest, new: Manifest) -> Iterator[Event]:
    """When Ready or Degraded changes, and why."""
    before = {found["type"]: found.get("status") for found in old.get("conditions") or ()}
    for found in new["conditions"]:
        kind, status = found["type"], found["status"]
        if kind in ("Ready", "Degraded") and status != before.get(kind, "False"):
            is_good = status == ("True" if kind == "Ready" else "False")
            word = {"Ready": "Ready", "Degraded": "Recovered"}[kind] if is_good else str(found["reason"])
            yield Event("Normal" if is_good else "Warning", word, found["message"])

"""Carry out a plan's steps, in order, against the API server and the gateways.

A refused step is noted and the rest goes on, so that the status can say so; a conflict or a lost answer ends the pass.
What the API server answers goes into the cache: the next look sees the own write even if the watch is late.
"""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baton_operator.api import Api
from baton_operator.cache import Cache
from baton_operator.errors import ApiError, Conflict, Refused
from baton_operator.kinds import BY_KIND
from baton_operator.metrics import Metrics
from baton_operator.objects import (
    API_VERSION,
    SERVICE_KIND,
    SERVICE_LABEL,
    Desired,
    GatewayReport,
    Manifest,
    ProbeReport,
    RandomSecret,
    Ref,
    StepFailure,
    Trouble,
    Where,
    is_owned,
    ref_of,
)
from baton_operator.observe import View
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
)
from baton_operator.pods import troubles_of
from baton_operator.probe import Gateways, WrongSecret, addresses_of

log = logging.getLogger(__name__)
_COMPONENT = "baton-operator"


@dataclass(slots=True)
class Outcome:
    """What a pass did and found out."""

    secret: str | None = None  # in: what the last pass knew of it
    num_writes: int = 0
    failures: list[StepFailure] = field(default_factory=list[StepFailure])
    probes: dict[str, ProbeReport] = field(default_factory=dict[str, ProbeReport])
    gateways: tuple[GatewayReport, ...] | None = None
    troubles: Mapping[Where, Trouble] | None = None  # None: pods were not looked at
    secrets: dict[Ref, Manifest | None] = field(default_factory=dict[Ref, "Manifest | None"])  # made; None: deleted
    requeue_s: float | None = None


class Executor:
    def __init__(self, api: Api, cache: Cache, gateways: Gateways, metrics: Metrics) -> None:
        self._api = api
        self._cache = cache
        self._gateways = gateways
        self._metrics = metrics

    async def carry_out(self, view: View, desired: Desired, steps: Iterable[Step], outcome: Outcome) -> None:
        """Do every step and note in `outcome` what came of it.

        Raises: TryAgain with the steps before it done.
        """
        was_refused = False
        for step in steps:
            if isinstance(step, Event):
                if not was_refused:
                    await self._emit(view, step)
                continue
            was_refused = False
            try:
                await self._do(view, desired, step, outcome)
            except Refused as error:
                was_refused = True
                outcome.failures.append(StepFailure(_ref_of(step), str(error)))
                log.warning("%s/%s: %s", desired.namespace, desired.name, error)

    async def _do(self, view: View, desired: Desired, step: Step, outcome: Outcome) -> None:
        match step:
            case Probe() | AskGateways():
                await self._ask(view, desired, step, outcome)
            case LookAtPods():
                outcome.troubles = await self._look_at_pods(desired)
            case RequeueAfter():
                outcome.requeue_s = step.seconds
            case Event():
                raise AssertionError("emitted by the caller")
            case Apply() | MakeSecret() | Scale() | Delete() | Status():
                await self._write(desired, step, outcome)
                outcome.num_writes += 1
                self._metrics.writes.labels(_ref_of(step).kind, type(step).__name__).inc()

    async def _write(self, desired: Desired, step: Apply | MakeSecret | Scale | Delete | Status, done: Outcome) -> None:
        space = desired.namespace
        match step:
            case Apply():
                if step.is_new:
                    await self._refuse_foreign(space, ref_of(step.manifest), desired.uid)
                self._cache.put(await self._api.apply(space, step.manifest, step.manager))
            case MakeSecret():
                await self._make_secret(space, step.secret, desired.uid, done)
            case Scale():
                metadata = {"uid": step.uid, "resourceVersion": step.resource_version}
                patch = {"metadata": metadata, "spec": {"replicas": step.replicas}}
                self._cache.put(await self._api.merge(space, step.ref, patch))
            case Delete():
                await self._api.delete(space, step.ref, step.uid, step.resource_version)
                self._cache.forget(space, step.ref, step.uid)
                if step.ref.kind == "Secret":
                    done.secrets[step.ref] = None
            case Status():
                uid = desired.uid if step.ref.kind == SERVICE_KIND else self._uid_of(desired, step.ref)
                self._cache.put(await self._api.apply_status(space, step.ref, uid, step.status))

    async def write_status(self, namespace: str, ref: Ref, uid: str, status: Mapping[str, Any]) -> None:
        """Raises: ApiError."""
        self._cache.put(await self._api.apply_status(namespace, ref, uid, status))
        self._metrics.writes.labels(ref.kind, Status.__name__).inc()

    async def _refuse_foreign(self, namespace: str, ref: Ref, uid: str) -> None:
        """An object of that name that the cache does not have: ours, if the cache is behind, or somebody else's."""
        found = await self._api.get(namespace, ref)
        if found is not None and not is_owned(found, uid):
            raise Refused(f"there is a {ref} that this service does not own; delete it or rename the service", 409)

    async def _make_secret(self, namespace: str, secret: RandomSecret, uid: str, outcome: Outcome) -> None:
        values = {key: base64.b64encode(secrets.token_hex(32).encode()).decode() for key in secret.keys}
        ref = ref_of(secret.manifest)
        try:
            made = await self._api.create(namespace, {**secret.manifest, "data": values})
        except Conflict:  # made by a pass whose answer was lost, or by somebody else
            await self._refuse_foreign(namespace, ref, uid)
            made = await self._api.get(namespace, ref)
        if made is not None:
            outcome.secrets[ref] = bare_secret(made)

    async def _ask(self, view: View, desired: Desired, step: Probe | AskGateways, outcome: Outcome) -> None:
        """Ask the gateways; once more with the secret as it is now if they refuse the one that was read before."""
        if outcome.secret is None:
            outcome.secret = await self._read_secret(desired)
        elif await self._has_asked(view, desired, step, outcome):
            return
        else:
            outcome.secret = await self._read_secret(desired)
        await self._has_asked(view, desired, step, outcome)

    async def _has_asked(self, view: View, desired: Desired, step: Probe | AskGateways, outcome: Outcome) -> bool:
        secret = outcome.secret or ""
        addresses = addresses_of(view.slices, f"{desired.name}-gateway", only_ready=isinstance(step, Probe))
        try:
            match step:
                case Probe():
                    outcome.probes[step.revision] = await self._gateways.probe(addresses, secret, step)
                case AskGateways():
                    outcome.gateways = await self._gateways.ask(addresses, secret)
        except WrongSecret:
            return False
        return True

    async def _look_at_pods(self, desired: Desired) -> dict[Where, Trouble]:
        """Nothing depends on it: without the right to list them, the status says less."""
        ours = replace(BY_KIND["v1", "Pod"], selector=f"{SERVICE_LABEL}={desired.name}")
        try:
            return troubles_of([pod async for page in self._api.list(ours, desired.namespace) for pod in page.items])
        except Refused as error:
            log.warning("%s/%s: cannot say why pods are missing: %s", desired.namespace, desired.name, error)
            return {}

    async def _read_secret(self, desired: Desired) -> str:
        """What the service's gateways know us by. Raises: Refused if it is not there."""
        internal = desired.secrets[0]
        ref, key = ref_of(internal.manifest), internal.keys[0]
        found = await self._api.get(desired.namespace, ref)
        if found is None or key not in (found.get("data") or {}):
            raise Refused(f"{ref} has no key {key!r}", 404)
        return base64.b64decode(found["data"][key]).decode()

    def _uid_of(self, desired: Desired, ref: Ref) -> str:
        """Raises: Conflict if the cache has it no more."""
        found = self._cache.of((desired.namespace, desired.name)).get(ref)
        if found is None:
            raise Conflict(f"{ref} is gone", 409)
        return found["metadata"]["uid"]

    async def _emit(self, view: View, event: Event) -> None:
        """Tell people. Nothing depends on it: one that cannot be written is only counted."""
        service = view.service["metadata"]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        manifest = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{service['name']}.{secrets.token_hex(8)}", "namespace": service["namespace"]},
            "involvedObject": {
                "apiVersion": API_VERSION, "kind": SERVICE_KIND,
                **{key: service[key] for key in ("name", "namespace", "uid", "resourceVersion")},
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:1024],
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": _COMPONENT},
            "reportingComponent": _COMPONENT,
        }  # fmt: skip
        log.info("%s/%s: %s: %s", service["namespace"], service["name"], event.reason, event.message)
        try:
            await self._api.create(service["namespace"], manifest)
        except ApiError as error:
            log.warning("event not written: %s", error)


def bare_secret(secret: Manifest) -> Manifest:
    """What is kept of a Secret: whose it is. Its values are nobody's business, and the rest is never read."""
    kept = ("name", "namespace", "uid", "resourceVersion", "ownerReferences", "deletionTimestamp")
    metadata = {key: value for key, value in secret["metadata"].items() if key in kept}
    return {"apiVersion": secret["apiVersion"], "kind": secret["kind"], "metadata": metadata}


def _ref_of(step: Step) -> Ref:
    match step:
        case Apply():
            return ref_of(step.manifest)
        case MakeSecret():
            return ref_of(step.secret.manifest)
        case Scale() | Delete() | Status():
            return step.ref
        case Probe() | AskGateways() | LookAtPods() | Event() | RequeueAfter():
            return Ref(API_VERSION, SERVICE_KIND, "")

"""One pass over one LLMService: observe, plan, carry out. Every trigger (watch events, resyncs, retries) ends here.

Passes over one service never overlap; passes over different services run side by side.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from baton_operator.api import Api
from baton_operator.apply import Executor, Outcome, bare_secret
from baton_operator.cache import Cache, Key
from baton_operator.desired import Platform, desire
from baton_operator.errors import ApiError, TryAgain
from baton_operator.metrics import Metrics
from baton_operator.newer_fields import without_newer_fields
from baton_operator.objects import Desired, Manifest, Ref, ref_of, status_of
from baton_operator.observe import Memory, View, look, observe
from baton_operator.plan import plan
from baton_operator.resources import ResourceError, live_service
from baton_operator.status import invalid_status

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 120.0
_SECRETS = ("internal", "redis")  # of which a service asks for some: what it asks for no more is to be seen, too
_PROBES_KEPT = 4  # revisions
_MANY_PASSES = 10
"""So many passes in a row that wrote are a fight with another writer: from here on they are spaced out."""


@dataclass(frozen=True, slots=True)
class Settings:
    platform: Platform
    secret_check_s: float = 3600.0
    """How long it may take until a Secret that somebody deleted is noticed: Secrets are not watched."""


class Reconciler:
    """`reconcile` says when to look again; None: when something changes."""

    def __init__(
        self,
        cache: Cache,
        api: Api,
        executor: Executor,
        metrics: Metrics,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._cache = cache
        self._api = api
        self._executor = executor
        self._metrics = metrics
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._memories: dict[Key, Memory] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Look at the service and do what may be done now. Returns after how many seconds to look again."""
        started = time.perf_counter()
        try:
            delay_s = await self._pass(key)
        except TryAgain as error:
            delay_s = self._after_failure(key, error)
            self._count("retried", error)
        except ApiError as error:  # refused where no plan could tell of it
            delay_s = self._after_failure(key, error)
            self._count("refused", error)
        finally:
            self._metrics.reconcile_seconds.observe(time.perf_counter() - started)
            self._metrics.last_reconcile.set(self._clock())
        return delay_s

    async def _pass(self, key: Key) -> float | None:
        view = look(self._cache, key)
        if view is None or view.is_deleted:
            self._memories.pop(key, None)
            self._metrics.reconciles.labels("gone").inc()
            return None
        try:
            desired = self._desire(view)
        except ResourceError as error:
            await self._refuse(key, view, str(error))
            return None
        memory = await self._with_secrets(key, view, desired)
        outcome = Outcome(secret=memory.secret)
        try:
            steps = plan(desired, observe(view, memory), self._clock())
            await self._executor.carry_out(view, desired, steps, outcome)
        finally:
            memory = self._memories[key] = self._remember(memory, outcome)
        return self._next(key, memory, outcome)

    def _desire(self, view: View) -> Desired:
        """Raises: ResourceError."""
        metadata = view.service["metadata"]
        spec, newer = without_newer_fields(view.service.get("spec") or {})
        service = live_service({**view.service, "spec": spec})
        desired = desire(service, self._settings.platform, uid=view.uid, generation=metadata["generation"])
        if not newer:
            return desired
        words = f"this operator is older than the CRD and does not know {', '.join(newer)}: upgrade it"
        return replace(desired, warnings=(*desired.warnings, words))

    async def _refuse(self, key: Key, view: View, message: str) -> None:
        """A spec that cannot be read: say so, change nothing else."""
        said = invalid_status(view.service, message, self._clock())
        if said != status_of(view.service):
            await self._executor.write_status(key[0], ref_of(view.service), view.uid, said)
        self._metrics.reconciles.labels("invalid").inc()

    def _memory(self, key: Key, view: View) -> Memory:
        """What is known of this service; nothing if another had its name."""
        known = self._memories.get(key)
        return known if known is not None and known.uid == view.uid else Memory(view.uid)

    async def _with_secrets(self, key: Key, view: View, desired: Desired) -> Memory:
        """Secrets are not watched (that would show all of them): each is looked at when it is due."""
        memory = self._memory(key, view)
        now = self._clock()
        wanted = [Ref("v1", "Secret", f"{key[1]}-{suffix}") for suffix in _SECRETS]
        is_due = now - memory.secrets_at > self._settings.secret_check_s
        unknown = {ref_of(secret.manifest) for secret in desired.secrets} - set(memory.secrets)
        if not is_due and not unknown:
            return memory
        found: dict[Ref, Manifest] = {}
        for ref in wanted:
            secret = await self._api.get(key[0], ref)
            if secret is not None:
                found[ref] = bare_secret(secret)
        memory = replace(memory, secrets=found, secrets_at=now)
        self._memories[key] = memory
        return memory

    def _remember(self, memory: Memory, outcome: Outcome) -> Memory:
        probes = {**memory.probes, **outcome.probes}
        newest = sorted(probes.values(), key=lambda report: report.at)[-_PROBES_KEPT:]
        memory = replace(memory, probes={report.revision: report for report in newest})
        if outcome.gateways is not None:
            memory = replace(memory, gateways=outcome.gateways, gateways_at=self._clock())
        if outcome.troubles is not None:
            memory = replace(memory, troubles=outcome.troubles, pods_at=self._clock())
        secrets = {ref: secret for ref, secret in {**memory.secrets, **outcome.secrets}.items() if secret is not None}
        secrets_at = float("-inf") if outcome.failures else memory.secrets_at  # it may be a Secret that is gone
        memory = replace(memory, secrets=secrets, secrets_at=secrets_at, secret=outcome.secret)
        return replace(memory, failures=tuple(outcome.failures))

    def _next(self, key: Key, memory: Memory, outcome: Outcome) -> float | None:
        """At once after a change (the next step may wait for it), later after a refusal, else when the plan says."""
        if outcome.failures:
            self._metrics.reconciles.labels("refused").inc()
            self._metrics.errors.labels("Refused").inc()
        else:
            has_learned = outcome.probes or outcome.gateways is not None or outcome.troubles is not None
            has_changed = bool(outcome.num_writes or has_learned)
            self._metrics.reconciles.labels("changed" if has_changed else "unchanged").inc()
            if not has_changed:
                self._memories[key] = replace(memory, num_retries=0)
                return None if outcome.requeue_s is None else outcome.requeue_s * (1.0 + 0.1 * self._jitter())
        self._memories[key] = memory = replace(memory, num_retries=memory.num_retries + 1)
        if not outcome.failures and memory.num_retries <= _MANY_PASSES:
            return 0.0
        return self.backoff_s(memory.num_retries - (0 if outcome.failures else _MANY_PASSES))

    def _after_failure(self, key: Key, error: ApiError) -> float:
        memory = self._memories.get(key)
        num_retries = 1
        if memory is not None:
            self._memories[key] = memory = replace(memory, num_retries=memory.num_retries + 1)
            num_retries = memory.num_retries
        log.info("%s/%s: will try again: %s", *key, error)
        return max(self.backoff_s(num_retries), error.after_s if isinstance(error, TryAgain) else 0.0)

    def backoff_s(self, num_retries: int) -> float:
        """Doubles up to two minutes; jittered, so that a thousand services do not come back at once."""
        longest = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** min(num_retries - 1, 16))
        return longest * (0.5 + 0.5 * self._jitter())

    def _count(self, outcome: str, error: ApiError) -> None:
        self._metrics.reconciles.labels(outcome).inc()
        self._metrics.errors.labels(type(error).__name__).inc()
